// The history as tiles: search, choose, download, more.

import * as api from "./api.js";
import { button, byId, download, input, isPressed, make, setPressed } from "./dom.js";
import { complain, toast } from "./say.js";

/** @typedef {import("./types.js").Picture} Picture */

const PAGE = 48;
const MOST_IN_ZIP = 500; // as the server has it

/** @type {Picture[]} */
let pictures = [];
/** @type {number | null} */
let next = null;
let words = "";
let asked = 0;
/** @type {Set<string>} */
const chosen = new Set();
/** @type {(picture: Picture, all: Picture[]) => void} */
let open = () => {};

/** @param {(picture: Picture, all: Picture[]) => void} onOpen */
export async function setUpGallery(onOpen) {
  open = onOpen;
  byId("more").addEventListener("click", () => load().catch(complain));
  byId("select").addEventListener("click", () => {
    setPressed(byId("select"), !isPressed(byId("select")));
    chosen.clear();
    show();
  });
  byId("zip").addEventListener("click", () => zip().catch(complain));
  let timer = 0;
  input("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = window.setTimeout(() => {
      words = input("search").value.trim();
      refresh().catch(complain);
    }, 250);
  });
  await refresh();
}

/** From the newest on. */
async function refresh() {
  next = null;
  pictures = [];
  await load();
}

async function load() {
  const mine = ++asked;
  const page = await api.get(address(PAGE, next));
  if (mine !== asked) return; // the search has gone on
  const here = new Set(pictures.map((picture) => picture.id));
  pictures.push(...page.pictures.filter((/** @type {Picture} */ picture) => !here.has(picture.id)));
  next = page.next;
  show();
}

/**
 * @param {number} limit
 * @param {number | null} before
 */
function address(limit, before) {
  const query = new URLSearchParams({ limit: String(limit) });
  if (before !== null) query.set("before", String(before));
  if (words) query.set("q", words);
  return `/pictures?${query}`;
}

/** @param {Picture[]} fresh just drawn */
export function addPictures(fresh) {
  if (words) return void refresh().catch(complain);
  const here = new Set(pictures.map((picture) => picture.id));
  pictures.unshift(...fresh.filter((picture) => !here.has(picture.id)).reverse());
  show();
}

/** @param {Picture} picture */
export async function removePicture(picture) {
  await api.remove(`/pictures/${picture.id}`);
  pictures = pictures.filter((one) => one.id !== picture.id);
  chosen.delete(picture.id);
  show();
}

function show() {
  const selecting = isPressed(byId("select"));
  byId("history-empty").hidden = pictures.length > 0;
  byId("history-empty").textContent = words
    ? "Nothing has these words in its settings."
    : "Nothing is here yet.";
  byId("more").hidden = next === null;
  button("zip").disabled = selecting ? !chosen.size : !pictures.length;
  byId("zip").textContent = selecting ? `Download ${chosen.size} (zip)` : "Download all (zip)";
  const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.picture;
  byId("gallery").replaceChildren(...pictures.map((picture) => tile(picture, selecting)));
  if (focused)
    /** @type {HTMLElement | null} */ (
      document.querySelector(`[data-picture="${CSS.escape(focused)}"]`)
    )?.focus();
}

/**
 * @param {Picture} picture
 * @param {boolean} selecting
 */
function tile(picture, selecting) {
  const press = () => {
    if (!selecting) return open(picture, pictures);
    if (!chosen.delete(picture.id)) chosen.add(picture.id);
    show();
  };
  const name = `${String(picture.settings.prompt ?? "") || "A picture"}, seed ${picture.seed_text ?? "unknown"}`;
  const one = make(
    "button",
    {
      type: "button",
      title: name.slice(0, 300),
      "aria-label": name.slice(0, 300),
      "data-picture": picture.id,
      onclick: press,
    },
    make("img", { src: picture.thumbnail, alt: "", loading: "lazy", width: 128, height: 128 }),
  );
  if (selecting) setPressed(one, chosen.has(picture.id));
  return make("li", {}, one);
}

async function zip() {
  let ids = [...chosen];
  if (!isPressed(byId("select"))) {
    ids = [];
    let before = null;
    do {
      const page = await api.get(address(200, before));
      ids.push(...page.pictures.map((/** @type {Picture} */ picture) => picture.id));
      before = page.next;
    } while (before !== null && ids.length < MOST_IN_ZIP);
    if (before !== null || ids.length > MOST_IN_ZIP) {
      ids = ids.slice(0, MOST_IN_ZIP);
      toast(`The newest ${MOST_IN_ZIP} pictures are in the file.`);
    }
  }
  if (ids.length) download(await api.postForFile("/pictures/zip", { ids }), "maple-pictures.zip");
}
