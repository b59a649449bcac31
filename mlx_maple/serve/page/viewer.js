// One picture, large: its settings, and what can be done with it.

import { button, byId, dialog, image, make } from "./dom.js";
import { fill } from "./form.js";
import { removePicture } from "./gallery.js";
import { complain, toast } from "./say.js";
import { rollSeed } from "./seeds.js";
import { editMask, setStart, sourceOfPicture } from "./start.js";
import { guarded, submit } from "./submit.js";
import { settingRows } from "./words.js";

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
  byId("use").addEventListener("click", () => {
    box.close();
    useSettings(all[place].draw);
  });
  byId("vary").addEventListener("click", () => {
    box.close();
    void vary(all[place]);
  });
  byId("to-start").addEventListener("click", () => start(all[place]));
  byId("to-mask").addEventListener("click", () => {
    start(all[place]);
    editMask().catch(complain);
  });
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

/** The file goes for good, so that it takes a second press. */
function deleteShown() {
  const press = button("viewer-delete");
  if (press.textContent === DELETE) {
    press.textContent = "Really delete it?";
    return;
  }
  removePicture(all[place]).then(() => {
    dialog("viewer").close();
    toast("The picture is deleted.");
  }, complain);
}

function show() {
  const picture = all[place];
  const shown = image("viewer-image");
  shown.src = picture.url;
  shown.alt = String(picture.settings.prompt ?? "A picture");
  button("viewer-delete").textContent = DELETE;
  button("viewer-previous").disabled = place === 0;
  button("viewer-next").disabled = place === all.length - 1;
  const link = /** @type {HTMLAnchorElement} */ (byId("viewer-download"));
  link.href = `${picture.url}?download=true`;
  link.download = `${picture.id}.png`;
  byId("viewer-settings").replaceChildren(
    ...settingRows({
      ...picture.settings,
      ...(picture.seed_text && { seed: picture.seed_text }),
    }).flatMap(([label, text]) => [make("dt", {}, label), make("dd", {}, text)]),
  );
}

/**
 * Settings of a picture into the form.
 * @param {import("./types.js").Draw} draw
 */
export function useSettings(draw) {
  const left = fill({ ...draw, count: undefined });
  toast(
    left.length
      ? `The settings are in the form, but ${left.join(", ")}.`
      : "The settings are in the form.",
  );
  byId("prompt").focus();
}

/** @param {Picture} picture */
async function vary(picture) {
  const draw = { ...picture.draw, seed: picture.seed_text ?? picture.draw.seed, count: 1 };
  const draws = Array.from({ length: VARIATIONS }, () => ({
    ...draw,
    variation_seed: rollSeed(),
    variation_strength: VARIATION,
  }));
  await guarded(() => submit(draws));
}

/** @param {Picture} picture */
function start(picture) {
  dialog("viewer").close();
  fill({ ...picture.draw, count: undefined }, { keepSeed: false });
  setStart(sourceOfPicture(picture));
  byId("prompt").focus();
}
