// Numbers and settings in words. Nothing here knows the page.

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

/** @type {Record<string, string>} */
const LABELS = {
  prompt: "Prompt",
  negative_prompt: "Negative prompt",
  model: "Model",
  vae: "Autoencoder",
  sampler: "Sampler",
  schedule: "Schedule",
  steps: "Steps",
  guidance_scale: "Guidance",
  seed: "Seed",
  width: "Width",
  height: "Height",
  strength: "Strength of change",
  clip_skip: "Clip skip",
  variation_seed: "Variation seed",
  variation_strength: "Variation strength",
  mask_blur: "Mask's blur",
  noise: "Noise as",
  eta: "Eta",
};

/**
 * Settings as pairs of label and text, the usual ones first.
 * @param {Record<string, unknown>} settings
 * @returns {[string, string][]}
 */
export function settingRows(settings) {
  const names = Object.keys(settings);
  const first = Object.keys(LABELS).filter((name) => names.includes(name));
  const others = names.filter((name) => !Object.hasOwn(LABELS, name));
  return [...first, ...others]
    .filter((name) => settings[name] !== null && settings[name] !== "" && !isEmpty(settings[name]))
    .map((name) => [
      LABELS[name] ?? name.replaceAll("_", " ").replace(/^./, (c) => c.toUpperCase()),
      typeof settings[name] === "object" ? JSON.stringify(settings[name]) : String(settings[name]),
    ]);
}

/** @param {unknown} value */
function isEmpty(value) {
  return typeof value === "object" && value !== null && Object.keys(value).length === 0;
}
