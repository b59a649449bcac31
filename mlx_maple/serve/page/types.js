// Shapes of what the server speaks (/api/v1), for readers and for `tsc --checkJs`; no code.

/**
 * @typedef {{name: string, weight: number}} Lora
 * @typedef {{name: string, image: string, [setting: string]: string | number}} Guide
 *
 * @typedef {{prompt: string, negative_prompt?: string, model?: string, vae?: string, width?: number,
 *   height?: number, steps?: number, guidance_scale?: number, seed?: string | number, count?: number,
 *   sampler?: string, schedule?: string, eta?: number, noise?: string, clip_skip?: number,
 *   variation_seed?: string | number, variation_strength?: number, image?: string, strength?: number,
 *   fit?: string, mask?: string, mask_blur?: number, depth_image?: string, loras?: Lora[], controls?: Guide[],
 *   image_prompts?: Guide[],
 *   [more: string]: unknown}} Draw
 *
 * @typedef {{id: string, job: string, index: number, created: number, width: number, height: number,
 *   url: string, thumbnail: string, seed: number | null, seed_text: string | null,
 *   settings: Record<string, unknown>, draw: Draw}} Picture
 *
 * @typedef {{stage: string, step: number, total: number, fraction: number,
 *   seconds_per_step: number, seconds_left: number, detail: string}} Progress
 *
 * @typedef {{id: string, state: "queued" | "running" | "done" | "failed" | "cancelled" | "offered",
 *   cancelling: boolean, position: number | null, client: string, mine: boolean | null,
 *   created: number, started: number | null, finished: number | null,
 *   draw: Record<string, unknown>, progress: Progress | null, has_preview: boolean, inputs: string[],
 *   pictures: Picture[], notes: string[], timings: Record<string, number> | null,
 *   error: {code: string, message: string} | null}} Job
 *
 * @typedef {{id: string, schedules: string[], has_eta: boolean}} Sampler
 * @typedef {{id: string, name: string, source: string, is_here: boolean, bytes: number | null,
 *   note: string, license: string}} Model
 * @typedef {{name: string, draw: Draw, changed: number}} Preset
 */

export {};
