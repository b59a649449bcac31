// A finished picture as a drawing again, with the pictures that it started from.

import * as api from "./api.js";

/** @typedef {import("./types.js").Draw} Draw */
/** @typedef {import("./types.js").Picture} Picture */

/** Pictures of a drawing, and lists of what looks at one, by what the server calls their files. */
const PICTURES = /** @type {const} */ (["image", "mask", "depth_image"]);
const LISTED = /** @type {const} */ ([
  ["controls", "control"],
  ["image_prompts", "ip_image"],
]);
/** What a picture does not know of its drawing, or by its file's name only. */
const LOADED = ["model", "unet", "vae", "taesd", "refiner", "quantize", "low_memory", "dtype"];

/**
 * The drawing that a picture came of; the server keeps what it started from.
 * @param {Picture} picture
 * @returns {Promise<{draw: Draw, lost: boolean}>} and whether some of that is kept no more
 */
export async function drawingOf(picture) {
  /** @type {Draw} */
  const draw = { ...picture.draw, seed: picture.seed_text ?? picture.draw.seed, count: 1 };
  let job;
  try {
    job = /** @type {import("./types.js").Job} */ (await api.get(`/jobs/${picture.job}`));
  } catch (error) {
    if (error instanceof api.ApiError && error.status === 404) return { draw, lost: false };
    throw error;
  }
  const { inputs } = job;
  const kept = (/** @type {string} */ name) => `input:${job.id}-${name}`;
  const asked = /** @type {Draw} */ (job.draw);
  for (const name of LOADED) if (asked[name] !== undefined) draw[name] = asked[name];
  for (const name of PICTURES.filter((one) => asked[one])) {
    if (!inputs.includes(name)) return { draw, lost: true };
    draw[name] = kept(name);
  }
  for (const [field, name] of LISTED) {
    const list = asked[field]?.map((one, i) => ({ ...one, image: `${name}-${i}` })) ?? [];
    if (list.some((one) => !inputs.includes(one.image))) return { draw, lost: true };
    if (list.length) draw[field] = list.map((one) => ({ ...one, image: kept(one.image) }));
  }
  return { draw, lost: false };
}
