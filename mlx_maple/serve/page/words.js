// Numbers and settings in words. Nothing here knows the page.

import { labelOf } from "./fields.js";

/** @typedef {import("./types.js").Progress} Progress */

/** @type {Record<string, string>} */
const STAGES = {
  loading: "Loading the model",
  text: "Reading the prompt",
  encode: "Reading the picture",
  decode: "Decoding",
  saving: "Saving",
};

/**
 * "Step 3 of 20 · 0.05 s/step · 1 s left"
 * @param {Progress | null} progress
 * @returns {string}
 */
export function progressWords(progress) {
  if (!progress) return "Starting…";
  if (progress.stage !== "sample")
    return `${STAGES[progress.stage] ?? progress.stage}${progress.detail ? ` · ${progress.detail}` : ""}…`;
  const words = [`Step ${progress.step} of ${progress.total}`];
  if (progress.seconds_per_step > 0) {
    words.push(
      `${short(progress.seconds_per_step)} s/step`,
      `${seconds(progress.seconds_left)} left`,
    );
  }
  return words.join(" · ");
}

/** @param {number} value */
function short(value) {
  return value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(2);
}

/**
 * "0.4 s", "12 s", "3 min 5 s"
 * @param {number} value
 * @returns {string}
 */
export function seconds(value) {
  if (value < 9.95) return `${Math.max(0, value).toFixed(1)} s`;
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/**
 * A finished job's time.
 * @param {import("./types.js").Job} job
 * @returns {string}
 */
export function elapsed(job) {
  if (job.started === null || job.finished === null) return "Done.";
  const count = job.pictures.length;
  const seed = job.pictures[0]?.seed_text;
  return `${count === 1 ? "Done" : `${count} pictures`} in ${seconds(job.finished - job.started)}${seed ? ` · seed ${seed}` : ""}`;
}

/** What people look for first. */
const FIRST = [
  ...["prompt", "negative_prompt", "model", "seed", "size", "steps", "guidance_scale"],
  ...["sampler", "schedule", "strength", "loras", "control", "only_masked"],
];
/** Shown among the first where they are not nothing. */
const TELLING = [
  ...["vae", "variation_strength", "variation_seed", "hires_scale", "hires_strength", "fit"],
  ...["hires_upscaler", "mask_blur", "refiner", "refiner_start", "guidance_rescale", "tile"],
];

/**
 * Settings as pairs of label and text: the usual ones, and the rest.
 * @param {Record<string, unknown>} settings
 * @returns {{first: [string, string][], rest: [string, string][]}}
 */
export function settingRows({ width, height, ...settings }) {
  const said = { ...settings, ...(width && height ? { size: `${width} × ${height}` } : {}) };
  const named = Object.entries(said).filter(([, value]) => !isEmpty(value));
  const isTelling = (/** @type {string} */ name) =>
    TELLING.includes(name) && Boolean(settings[name]);
  const first = named.filter(([name]) => FIRST.includes(name) || isTelling(name));
  const place = (/** @type {string} */ name) => [...FIRST, ...TELLING].indexOf(name);
  first.sort(([one], [other]) => place(one) - place(other));
  return { first: first.map(row), rest: named.filter((pair) => !first.includes(pair)).map(row) };
}

/** @param {[string, unknown]} pair @returns {[string, string]} */
const row = ([name, value]) => [
  labelOf(name),
  typeof value === "object" ? JSON.stringify(value) : String(value),
];

/** @param {unknown} value */
function isEmpty(value) {
  if (typeof value !== "object") return value === "" || value === undefined;
  return value === null || Object.keys(value).length === 0;
}
