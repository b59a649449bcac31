// A finished picture as a drawing again, with the pictures that it started from.

import * as api from "./api.js";

/** @typedef {import("./types.js").Draw} Draw */
/** @typedef {import("./types.js").Picture} Picture */

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
  const { model, image, mask, depth_image, controls } = /** @type {Draw} */ (job.draw);
  if (model) draw.model = model; // the picture knows the file's name only
  const wanted = [
    ...(image ? ["image"] : []),
    ...(mask ? ["mask"] : []),
    ...(depth_image ? ["depth_image"] : []),
    ...(controls ?? []).map((_, i) => `control-${i}`),
  ];
  if (wanted.some((name) => !inputs.includes(name))) return { draw, lost: true };
  if (image) draw.image = kept("image");
  if (mask) draw.mask = kept("mask");
  if (depth_image) draw.depth_image = kept("depth_image");
  if (controls) {
    draw.controls = controls.map((one, i) => ({ ...one, image: kept(`control-${i}`) }));
  }
  return { draw, lost: false };
}
