// The picture that a drawing starts from, and its mask.

import { byId, image, input } from "./dom.js";
import { paintMask } from "./mask.js";
import { complain } from "./say.js";
import { sourceOf, sourceOfFile } from "./sources.js";

/** @typedef {import("./sources.js").Source} Source */

/** @type {Source | null} */
let start = null;
/** @type {Source | null} */
let mask = null;
/** For models that follow one. @type {Source | null} */
let depth = null;
/** @type {() => void} */
let onChange = () => {};

/** @param {() => void} changed called when there is another picture, or none */
export function setUpStart(changed) {
  onChange = changed;
  input("start-file").addEventListener("change", fromInput);
  input("depth_image").addEventListener("change", async () => {
    const file = input("depth_image").files?.[0];
    depth = file ? await sourceOfFile(file) : null;
  });
  byId("start-clear").addEventListener("click", () => {
    setStart(null);
    byId("prompt").focus();
  });
  byId("start-mask").addEventListener("click", () => editMask().catch(complain));
}

async function fromInput() {
  const file = input("start-file").files?.[0];
  if (!file) return;
  try {
    setStart(await sourceOfFile(file));
  } catch (error) {
    complain(error);
  }
}

/**
 * @param {Source | null} source
 * @param {Source | null} [over] its mask
 */
export function setStart(source, over = null) {
  start = source;
  mask = over;
  input("start-file").value = "";
  show();
}

/** As a drawing says. @param {import("./types.js").Draw} draw */
export function fillStart(draw) {
  setStart(draw.image ? sourceOf(draw.image) : null, draw.mask ? sourceOf(draw.mask) : null);
  depth = draw.depth_image ? sourceOf(draw.depth_image) : null;
}

/** Let the reader paint a mask over the picture to start from. */
export async function editMask() {
  if (!start) return;
  const painted = await paintMask(start.url, mask?.url);
  if (painted !== null) mask = painted ? sourceOf(painted) : null;
  show();
}

function show() {
  byId("start-strip").hidden = start === null;
  if (start) {
    image("start-shown").src = start.url;
    byId("start-name").textContent = mask
      ? `Draws the painted part of ${start.name} again`
      : `Starts from ${start.name}`;
    byId("start-mask").textContent = mask ? "Change the mask" : "Inpaint";
  }
  onChange();
}

export const hasStart = () => start !== null;

/** @returns {{image?: string, mask?: string, depth_image?: string}} fields of a Draw */
export function startFields() {
  const followsDepth = !byId("depth_image").closest("[hidden]");
  return {
    ...(depth && followsDepth && { depth_image: depth.sent }),
    ...(start && { image: start.sent }),
    ...(start && mask && { mask: mask.sent }),
  };
}
