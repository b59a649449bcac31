// ControlNets: a row for each, with the picture that it follows, its weight, its share of the steps,
// and what is made of the picture first.

import { byId, iconButton, make, select, setOptions } from "./dom.js";
import { whenDropped } from "./drop.js";
import { complain, FormError } from "./say.js";
import { sourceOf, sourceOfFile } from "./sources.js";

/** @typedef {import("./types.js").Control} Control */
/** @typedef {import("./sources.js").Source} Source */
/** @typedef {Omit<Control, "image"> & {source: Source | null}} Row */

/** What the preprocessors make, in words; others go by their names. @type {Record<string, string>} */
const MADE = {
  none: "nothing: it is ready",
  canny: "edges (canny)",
  scribble: "scribble",
  invert: "inverted",
  depth: "depth",
};
const NUMBERS = /** @type {const} */ ([
  ["weight", "Weight", "-10", "10"],
  ["start", "From", "0", "1"],
  ["end", "Until", "0", "1"],
]);

/** @type {Row[]} */
let rows = [];
/** @type {string[]} */
let preprocessors = ["none"];
let most = 1;

export function setUpControls() {
  select("control-add").addEventListener("change", () => {
    const name = select("control-add").value;
    if (name && rows.length < most) {
      rows.push({ name, source: null, weight: 1, start: 0, end: 1, preprocess: "none" });
    }
    select("control-add").value = "";
    show();
    focusLast();
  });
}

/**
 * @param {string[]} names of the ControlNets in the model folders
 * @param {any} schemas of the OpenAPI document
 */
export function offerControls(names, schemas) {
  byId("control-none").hidden = names.length > 0;
  preprocessors = schemas.Control?.properties.preprocess.enum ?? preprocessors;
  const list = schemas.Draw?.properties.controls?.anyOf ?? [];
  most = list.find((/** @type {any} */ part) => part.maxItems)?.maxItems ?? 1;
  setOptions(select("control-add"), [
    { value: "", label: "choose…" },
    ...names.map((value) => ({ value })),
  ]);
  show();
}

/**
 * The field of a Draw, where there are any.
 * @returns {{controls?: Control[]}}
 * @throws {FormError} where one has no picture
 */
export function controlFields() {
  if (!rows.length) return {};
  return {
    controls: rows.map(({ source, ...row }, i) => {
      if (source) return { ...row, image: source.sent };
      throw new FormError(`control-file-${i}`, `${row.name} needs a picture to follow`);
    }),
  };
}

/** @param {Control[]} list */
export function fillControls(list) {
  rows = list.map(({ image, ...row }) => ({ ...row, source: sourceOf(image) }));
  show();
}

function focusLast() {
  /** @type {HTMLElement | null} */ (
    byId("controls").querySelector("li:last-child input[type=file]")
  )?.focus();
}

function show() {
  select("control-add").disabled = rows.length >= most || select("control-add").options.length < 2;
  byId("controls").replaceChildren(...rows.map(shown));
  byId("form").dispatchEvent(new Event("change"));
}

/**
 * @param {Row} row
 * @param {number} place
 */
function shown(row, place) {
  const named = (/** @type {string} */ what) => `${what} of ${row.name}`;
  const take = async (/** @type {File | undefined} */ file) => {
    if (!file) return;
    try {
      row.source = await sourceOfFile(file);
      show();
    } catch (error) {
      complain(error);
    }
  };
  const drop = () => {
    rows = rows.filter((one) => one !== row);
    show();
    select("control-add").focus();
  };
  const file = make("input", {
    id: `control-file-${place}`,
    type: "file",
    accept: "image/png,image/jpeg,image/webp",
    "aria-label": `Picture that ${row.name} follows`,
    onchange: (/** @type {Event} */ event) =>
      void take(/** @type {HTMLInputElement} */ (event.target).files?.[0]),
  });
  const numbers = NUMBERS.map(([name, label, min, max]) =>
    make(
      "label",
      {},
      label,
      make("input", {
        type: "number",
        min,
        max,
        step: "0.05",
        value: String(row[name]),
        "aria-label": named(label),
        oninput: (/** @type {Event} */ event) => {
          const box = /** @type {HTMLInputElement} */ (event.target);
          if (box.value !== "" && box.validity.valid) row[name] = Number(box.value);
        },
      }),
    ),
  );
  const preprocess = make(
    "select",
    {
      "aria-label": named("Preprocessor"),
      onchange: (/** @type {Event} */ event) => {
        row.preprocess = /** @type {HTMLSelectElement} */ (event.target).value;
      },
    },
    ...preprocessors.map((value) => make("option", { value }, MADE[value] ?? value)),
  );
  preprocess.value = row.preprocess;
  const item = make(
    "li",
    { className: "control" },
    make(
      "div",
      { className: "row" },
      make("span", { className: "text" }, row.name),
      iconButton("close", `Remove ${row.name}`, drop),
    ),
    make(
      "div",
      { className: "row" },
      row.source
        ? make("img", { src: row.source.url, alt: named("Picture") })
        : make("span", { className: "quiet small" }, "Drop a picture here, or choose one:"),
      file,
    ),
    make("div", { className: "row numbers" }, ...numbers),
    make("label", {}, "Made of the picture first", preprocess),
  );
  whenDropped(item, take);
  return item;
}
