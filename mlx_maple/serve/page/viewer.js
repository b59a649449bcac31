// One picture, large: its settings, and what can be done with it.

import { drawingOf } from "./again.js";
import { button, byId, dialog, image, make } from "./dom.js";
import { FIELDS } from "./fields.js";
import { fill } from "./form.js";
import { removePicture } from "./gallery.js";
import { fillGuides } from "./guides.js";
import { dropPicture } from "./jobs.js";
import { literals } from "./prompts.js";
import { useSettings } from "./restore.js";
import { complain, toast } from "./say.js";
import { rollSeed } from "./seeds.js";
import { sourceOf } from "./sources.js";
import { editMask, setStart } from "./start.js";
import { guarded, submit } from "./submit.js";
import { settingRows } from "./words.js";

/** @typedef {import("./types.js").Draw} Draw */
/** @typedef {import("./types.js").Picture} Picture */

const VARIATION = 0.2; // near enough to be the same picture, far enough to differ
const VARIATIONS = 4;
const DELETE = "Delete";

/** @type {Picture[]} */
let all = [];
let place = 0;

export function setUpViewer() {
  const box = dialog("viewer");
  byId("viewer-close").addEventListener("click", () => box.close());
  byId("viewer-previous").addEventListener("click", () => go(-1));
  byId("viewer-next").addEventListener("click", () => go(1));
  box.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    else if (event.key === "ArrowRight") go(1);
  });
  for (const [id, act] of Object.entries({
    use: useSettings,
    vary,
    "to-start": startFrom,
    "to-mask": inpaint,
  })) {
    byId(id).addEventListener("click", () => {
      box.close();
      act(all[place]).catch(complain);
    });
  }
  byId("viewer-delete").addEventListener("click", deleteShown);
}

/**
 * @param {Picture} picture
 * @param {Picture[]} others that it lies among
 */
export function openViewer(picture, others) {
  all = [...others];
  place = Math.max(
    0,
    all.findIndex((one) => one.id === picture.id),
  );
  show();
  if (!dialog("viewer").open) dialog("viewer").showModal();
}

/** @param {number} by */
function go(by) {
  if (!all[place + by]) return;
  place += by;
  show();
}

/** Beside the icon. */
const deleteWords = () => /** @type {Text} */ (byId("viewer-delete").lastChild);

/** The file goes for good, so that it takes a second press. */
function deleteShown() {
  if (deleteWords().textContent === DELETE) {
    deleteWords().textContent = "Really delete it?";
    return;
  }
  const { id } = all[place];
  removePicture(all[place]).then(() => {
    dropPicture(id);
    dialog("viewer").close();
    toast("The picture is deleted.");
  }, complain);
}

function show() {
  const picture = all[place];
  const shown = image("viewer-image");
  shown.src = picture.url;
  shown.alt = String(picture.settings.prompt ?? "A picture");
  deleteWords().textContent = DELETE;
  button("viewer-previous").disabled = place === 0;
  button("viewer-next").disabled = place === all.length - 1;
  const link = /** @type {HTMLAnchorElement} */ (byId("viewer-download"));
  link.href = `${picture.url}?download=true`;
  link.download = `${picture.id}.png`;
  const { first, rest } = settingRows({
    ...picture.settings,
    width: picture.width, // a second, larger drawing's where there was one
    height: picture.height,
    ...(picture.seed_text && { seed: picture.seed_text }),
  });
  byId("viewer-settings").replaceChildren(...described(first));
  byId("viewer-more").replaceChildren(...described(rest));
}

/** @param {[string, string][]} rows */
const described = (rows) =>
  rows.flatMap(([label, text]) => [make("dt", {}, label), make("dd", {}, text)]);

/**
 * Four more of the same drawing, near to it; what it started from stays as it was.
 * @param {Picture} picture
 */
export async function vary(picture) {
  await guarded(async () => {
    const { draw, lost } = await drawingOf(picture);
    if (lost) throw new Error("It cannot be varied: the picture that it started from is gone.");
    const draws = Array.from({ length: VARIATIONS }, () => ({
      ...draw,
      variation_seed: rollSeed(),
      variation_strength: VARIATION,
    }));
    return submit(draws);
  });
}

/** @param {Picture} picture */
export async function startFrom(picture) {
  fill(onwards(picture), { keepSeed: false });
  fillGuides({ prompt: "" });
  setStart({ ...sourceOf(`picture:${picture.id}`) });
  byId("prompt").focus();
}

/**
 * Its drawing, to go on from it. A second, larger drawing goes with no picture to start from: the
 * size is what it came to.
 * @param {Picture} picture
 * @returns {Draw}
 */
function onwards({ draw, width, height }) {
  const all = { ...draw, ...literals(draw), count: undefined };
  if (draw.hires_scale === undefined) return all;
  // One too large to be asked for is left to the server, which follows the picture.
  const fits = Math.max(width, height) <= (FIELDS.width.high ?? Infinity);
  const kept = Object.entries(all).filter(([name]) => !name.startsWith("hires_"));
  const size = fits ? { width, height } : { width: undefined, height: undefined };
  return /** @type {Draw} */ ({ ...Object.fromEntries(kept), ...size });
}

/** @param {Picture} picture */
export async function inpaint(picture) {
  await startFrom(picture);
  await editMask();
}
