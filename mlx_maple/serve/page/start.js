// The picture that a drawing starts from, and its mask.

import { byId, dataUrl, image, input } from "./dom.js";
import { paintMask } from "./mask.js";
import { complain } from "./say.js";

/**
 * A picture to send: what the server takes for it, and where the page shows it from.
 * @typedef {{sent: string, url: string, name: string}} Source
 */

/** @type {Source | null} */
let start = null;
/** @type {string | null} */
let mask = null;
/** @type {() => void} */
let onChange = () => {};

/** @param {() => void} changed called when there is another picture, or none */
export function setUpStart(changed) {
  onChange = changed;
  input("start-file").addEventListener("change", fromInput);
  byId("start-clear").addEventListener("click", () => setStart(null));
  byId("start-mask").addEventListener("click", () => editMask().catch(complain));
}

async function fromInput() {
  const file = input("start-file").files?.[0];
  if (!file) return;
  try {
    setStart(await sourceOf(file));
  } catch (error) {
    complain(error);
  }
}

/**
 * @param {File} file
 * @returns {Promise<Source>}
 */
export async function sourceOf(file) {
  const url = await dataUrl(file);
  return { sent: url, url, name: file.name };
}

/** @param {import("./types.js").Picture} picture @returns {Source} */
export function sourceOfPicture(picture) {
  return { sent: `picture:${picture.id}`, url: picture.url, name: "a picture of the history" };
}

/** @param {Source | null} source */
export function setStart(source) {
  start = source;
  mask = null;
  input("start-file").value = "";
  show();
}

/** Let the reader paint a mask over the picture to start from. */
export async function editMask() {
  if (!start) return;
  const painted = await paintMask(start.url);
  if (painted !== null) mask = painted || null;
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

/** @returns {{image?: string, mask?: string}} fields of a Draw */
export function startFields() {
  return {
    ...(start && { image: start.sent }),
    ...(start && mask && { mask }),
  };
}
