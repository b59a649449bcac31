// The settings that are one value each: their labels, kinds and bounds. The form's rows, the axes of
// grids and the words in the viewer are made of this table. Nothing here knows the page.

/**
 * One setting.
 *
 * label     what it is called
 * kind      whole, number; word (one of several); flag (yes or no); seed; text; picture
 * usual     what holds where nothing is said, shown in grey
 * low, high bounds; the server's own
 * step      of the arrows; whole numbers are multiples of it
 * slider    least and most of a slider beside the number
 * options   value and words of each choice
 * hint      values for a grid, as an example
 * title     a line more
 * families  beginnings of the names of model families that take it
 * isNumber  its choices are numbers
 *
 * @typedef {{label: string, kind: "whole" | "number" | "word" | "flag" | "seed" | "text"
 *     | "picture",
 *   usual?: string, low?: number, high?: number, step?: number, slider?: [number, number],
 *   options?: [string, string][], hint?: string, title?: string, families?: string[], isNumber?: boolean}} Field
 */

/** By the name in a drawing; grids offer them in this order. @type {Record<string, Field>} */
export const FIELDS = {
  steps: {
    label: "Steps",
    kind: "whole",
    low: 1,
    high: 200,
    slider: [1, 50],
    hint: "4, 8, 16 or 10-30 (+10)",
  },
  guidance_scale: {
    label: "Guidance",
    kind: "number",
    low: -100,
    high: 100,
    step: 0.5,
    slider: [1, 15],
    hint: "1-9 (+2)",
    title: "How closely the prompt is followed; 1 is unguided and takes half the time",
  },
  seed: { label: "Seed", kind: "seed", usual: "a new one each time", hint: "1-4" },
  sampler: { label: "Sampler", kind: "word", hint: "ddim, euler, dpmpp_2m" },
  schedule: { label: "Schedule", kind: "word", hint: "leading, karras" },
  model: { label: "Model", kind: "word", hint: "names of models" },
  vae: { label: "Autoencoder (VAE)", kind: "word", hint: "names of autoencoders" },
  unet: { label: "UNet from elsewhere", kind: "word", hint: "names of UNets" },
  width: { label: "Width", kind: "whole", low: 64, high: 2048, step: 8, hint: "64, 128" },
  height: { label: "Height", kind: "whole", low: 64, high: 2048, step: 8, hint: "64, 128" },
  count: { label: "Pictures", kind: "whole", usual: "1", low: 1, high: 16 },
  strength: {
    label: "Strength of change",
    kind: "number",
    usual: "0.75",
    low: 0,
    high: 1,
    step: 0.05,
    slider: [0, 1],
    hint: "0.3-0.9 (+0.2)",
  },
  variation_strength: {
    label: "Variation",
    kind: "number",
    usual: "0",
    low: 0,
    high: 1,
    step: 0.05,
    slider: [0, 1],
    hint: "0-0.4 (+0.1)",
  },
  variation_seed: { label: "Variation seed", kind: "seed", usual: "a new one", hint: "1-4" },
  hires_scale: {
    label: "Times larger",
    kind: "number",
    usual: "not drawn again",
    low: 1,
    high: 4,
    step: 0.25,
    hint: "1.5, 2",
  },
  hires_strength: {
    label: "Change when larger",
    kind: "number",
    usual: "0.5",
    low: 0.01,
    high: 1,
    step: 0.05,
    hint: "0.3-0.7 (+0.2)",
  },
  hires_steps: {
    label: "Steps when larger",
    kind: "whole",
    usual: "as many",
    low: 1,
    high: 200,
    hint: "5, 10",
  },
  hires_upscaler: {
    label: "Enlarged by",
    kind: "word",
    usual: "latent",
    options: [
      ["latent", "latent"],
      ["lanczos", "Lanczos"],
    ],
    hint: "latent, lanczos",
  },
  refiner: {
    label: "Refiner",
    kind: "word",
    usual: "none",
    hint: "names of models",
    families: ["sdxl"],
  },
  refiner_start: {
    label: "Refiner from",
    kind: "number",
    usual: "0.8",
    low: 0,
    high: 1,
    step: 0.05,
    hint: "0.6-0.9 (+0.1)",
    families: ["sdxl"],
  },
  clip_skip: {
    label: "Clip skip",
    kind: "whole",
    usual: "the model's own",
    low: 1,
    high: 64,
    hint: "1, 2",
    title: "Layer of the text encoder that is read, from the end; 1 is the last",
  },
  guidance_rescale: {
    label: "Guidance rescale",
    kind: "number",
    usual: "0",
    low: 0,
    high: 1,
    step: 0.05,
    hint: "0-0.7 (+0.35)",
    title: "Against colours that guidance makes too strong",
  },
  guidance_start: {
    label: "Guided from",
    kind: "number",
    usual: "0",
    low: 0,
    high: 1,
    step: 0.05,
    hint: "0, 0.1",
    title: "Share of the steps before which the prompt alone decides",
  },
  guidance_end: {
    label: "Guided until",
    kind: "number",
    usual: "1",
    low: 0,
    high: 1,
    step: 0.05,
    hint: "0.6-1 (+0.2)",
    title: "Share of the steps after which it is not guided, which saves half of their time",
  },
  image_guidance_scale: {
    label: "Picture guidance",
    kind: "number",
    usual: "1.5",
    low: 0,
    high: 100,
    step: 0.1,
    hint: "1-2 (+0.5)",
    title: "How closely a model that edits stays with the picture",
  },
  eta: {
    label: "Eta",
    kind: "number",
    usual: "the sampler's own",
    low: 0,
    high: 1,
    step: 0.05,
    hint: "0-1 (+0.5)",
    title: "Share of fresh noise in each step",
  },
  tile: {
    label: "Seamless edges",
    kind: "word",
    usual: "no",
    options: [
      ["x", "left and right"],
      ["y", "top and bottom"],
      ["xy", "all four"],
    ],
    hint: "x, y, xy",
  },
  window: {
    label: "Draw in windows of",
    kind: "whole",
    usual: "the whole",
    low: 64,
    high: 2048,
    step: 8,
    hint: "512, 768",
    title: "Pixels a side that the network sees at once, for pictures larger than it was made for",
  },
  window_overlap: {
    label: "Windows overlap",
    kind: "number",
    usual: "0.5",
    low: 0,
    high: 0.9,
    step: 0.05,
    hint: "0.25, 0.5",
  },
  fit: {
    label: "Fit",
    kind: "word",
    usual: "stretch",
    options: [
      ["stretch", "stretch"],
      ["crop", "crop"],
    ],
    hint: "stretch, crop",
  },
  mask_blur: {
    label: "Mask's blur",
    kind: "number",
    usual: "4",
    low: 0,
    high: 64,
    step: 1,
    hint: "0, 4, 8",
  },
  noise: {
    label: "Noise as",
    kind: "word",
    usual: "torch",
    hint: "torch, nvidia",
    title: "Whose random numbers: nvidia for the pictures that A1111 draws",
  },
  syntax: {
    label: "Brackets in prompts",
    kind: "word",
    usual: "are weights",
    options: [
      ["a1111", "are weights (A1111)"],
      ["plain", "are plain text"],
    ],
    hint: "a1111, plain",
  },
  discard_penultimate: {
    label: "Leave out the last but one",
    kind: "flag",
    hint: "true, false",
    title: "A noise level that A1111 has an option to discard",
  },
  low_memory: {
    label: "Low memory",
    kind: "flag",
    usual: "the server's",
    hint: "true, false",
    title: "Hold one network at a time: less memory, more time",
  },
  quantize: {
    label: "Weights in",
    kind: "word",
    isNumber: true,
    usual: "the server's",
    options: [
      ["0", "as stored"],
      ["8", "8 bits"],
      ["4", "4 bits"],
    ],
    hint: "0, 8, 4",
  },
  dtype: {
    label: "Calculates in",
    kind: "word",
    usual: "the device's",
    options: [
      ["float16", "float16"],
      ["bfloat16", "bfloat16"],
      ["float32", "float32"],
    ],
    hint: "float16, float32",
  },
  emphasis: {
    label: "Weights on words",
    kind: "word",
    usual: "original",
    options: [
      ["original", "original"],
      ["no norm", "no norm"],
    ],
    hint: "original, no norm",
  },
  mask_content: {
    label: "Under the mask",
    kind: "word",
    usual: "original",
    options: [
      ["original", "the picture"],
      ["fill", "its surroundings"],
      ["noise", "noise"],
      ["nothing", "nothing"],
    ],
    hint: "original, fill",
  },
  only_masked: {
    label: "Mask's padding",
    kind: "whole",
    usual: "whole picture",
    low: 0,
    high: 4096,
    step: 1,
    hint: "0, 32, 64",
    title: "Draw the masked part alone at full size, with so many pixels around it, and put it back",
  },
  sample_posterior: {
    label: "Sample the picture's latents",
    kind: "flag",
    usual: "no",
    hint: "true, false",
  },
  zeroed_negative: {
    label: "Avoid nothing at all",
    kind: "flag",
    usual: "no",
    hint: "true, false",
    title: "Not even an empty negative prompt",
    families: ["sdxl"],
  },
  aesthetic_score: {
    label: "Aesthetic score",
    kind: "number",
    usual: "6",
    low: 0,
    high: 20,
    step: 0.5,
    hint: "5, 7",
    title: "That SDXL's refiner is told",
    families: ["sdxl"],
  },
  negative_aesthetic_score: {
    label: "Its negative",
    kind: "number",
    usual: "2.5",
    low: 0,
    high: 20,
    step: 0.5,
    hint: "2, 3",
    families: ["sdxl"],
  },
  token_merging: {
    label: "Token merging",
    kind: "number",
    usual: "0",
    low: 0,
    high: 0.9,
    step: 0.05,
    hint: "0, 0.3, 0.5",
    title:
      "Share of the pixels that look around as one: faster where pictures are large, less detail",
  },
  deep_cache: {
    label: "DeepCache every",
    kind: "whole",
    usual: "not used",
    low: 1,
    high: 100,
    hint: "1-3",
    title: "Of so many steps one runs the deep part of the network: much faster, another picture",
  },
  deep_cache_branch: {
    label: "DeepCache branch",
    kind: "whole",
    usual: "0",
    low: 0,
    high: 63,
    hint: "0, 1",
    title: "How much runs every time; 0 is the least",
  },
  freeu: {
    label: "FreeU",
    kind: "text",
    usual: "b1 b2 s1 s2",
    title: "Four factors with spaces between, such as 1.5 1.6 0.9 0.2",
  },
  hires_prompt: { label: "Prompt when larger", kind: "text", usual: "the same" },
  hires_negative_prompt: { label: "Negative when larger", kind: "text", usual: "the same" },
  taesd: { label: "Small autoencoder", kind: "word", usual: "none", title: "For previews" },
  preview: {
    label: "Previews",
    kind: "word",
    options: [
      ["linear", "linear"],
      ["taesd", "small autoencoder"],
    ],
    usual: "linear",
  },
  depth_image: { label: "Depth map", kind: "picture", families: ["sd2-depth"] },
  ensd: { label: "Eta noise seed delta", kind: "whole", usual: "0", hint: "0, 31337" },
};

/**
 * What a setting is called; also one that this page does not know yet.
 * @param {string} name
 */
export function labelOf(name) {
  const known = Object.hasOwn(FIELDS, name) ? FIELDS[name].label : undefined;
  return known ?? name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase());
}

/**
 * A setting that the server takes and this page does not know, from its schema.
 * @param {string} name
 * @param {any} schema of one property, as the OpenAPI document has it
 * @returns {Field | null} null where it is not one value
 */
export function fieldOf(name, schema) {
  const one = [schema, ...(schema.anyOf ?? [])].find((part) => part.type && part.type !== "null");
  /** @type {Record<string, Field["kind"]>} */
  const kinds = { integer: "whole", number: "number", boolean: "flag" };
  // A single word that is always the same is no choice.
  const kind = one?.enum ? "word" : kinds[one?.type];
  if (!kind) return null;
  return {
    label: labelOf(name),
    kind,
    ...(one.minimum !== undefined && { low: one.minimum }),
    ...(one.maximum !== undefined && { high: one.maximum }),
    ...(one.multipleOf !== undefined && { step: one.multipleOf }),
    ...(one.enum && {
      options: one.enum.map((/** @type {unknown} */ word) => [String(word), String(word)]),
      isNumber: typeof one.enum[0] === "number",
    }),
    ...(schema.description && { title: schema.description }),
  };
}
