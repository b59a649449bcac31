// Networks that look at a picture: ControlNets, which follow it, and IP-Adapters, for which it is a
// prompt. A row for each, with its picture and what else the server's schema says of it.

import { byId, iconButton, make, select, setOptions } from "./dom.js";
import { whenDropped } from "./drop.js";
import { complain, FormError } from "./say.js";
import { sourceOf, sourceOfFile } from "./sources.js";

/** @typedef {import("./types.js").Draw} Draw */
/** @typedef {import("./types.js").Guide} Guide */
/** @typedef {{name: string, source: import("./sources.js").Source | null,
 *   values: Record<string, string | number>}} Row */

/** What the settings of a row are called. @type {Record<string, string>} */
const LABELS = {
  weight: "Weight",
  scale: "Strength",
  start: "From",
  end: "Until",
  preprocess: "Made of the picture first",
};
/** What the preprocessors make, in words; others go by their names. @type {Record<string, string>} */
const MADE = {
  none: "nothing: it is ready",
  canny: "edges (canny)",
  scribble: "scribble",
  invert: "inverted",
  depth: "depth",
};

/** The rows of one kind. */
class Guides {
  /**
   * @param {"controls" | "image_prompts"} field of a Draw; the list's id too
   * @param {string} prefix of the ids of what belongs to it
   * @param {string} schema of one row
   * @param {string} networks as the server lists them
   */
  constructor(field, prefix, schema, networks) {
    this.field = field;
    this.networks = networks;
    this._prefix = prefix;
    this._schema = schema;
    /** @type {Row[]} */
    this._rows = [];
    /** Name and schema of each setting of a row. @type {[string, any][]} */
    this._settings = [];
    this._most = 1;
  }

  setUp() {
    this._add().addEventListener("change", () => {
      const name = this._add().value;
      if (name && this._rows.length < this._most) {
        const usual = this._settings.map(([setting, { default: value }]) => [setting, value]);
        this._rows.push({ name, source: null, values: Object.fromEntries(usual) });
      }
      this._add().value = "";
      this._show();
      /** @type {HTMLElement | null} */ (
        byId(this.field).querySelector("li:last-child input[type=file]")
      )?.focus();
    });
  }

  /**
   * @param {string[]} names of the networks in the model folders
   * @param {Record<string, any>} schemas of the OpenAPI document
   */
  offer(names, schemas) {
    const properties = schemas[this._schema]?.properties ?? {};
    this._settings = Object.entries(properties).filter(
      ([name]) => !["name", "image"].includes(name),
    );
    const list = schemas.Draw?.properties[this.field]?.anyOf ?? [];
    this._most = list.find((/** @type {any} */ part) => part.maxItems)?.maxItems ?? 1;
    byId(`${this._prefix}-none`).hidden = names.length > 0;
    setOptions(this._add(), [
      { value: "", label: "choose…" },
      ...names.map((value) => ({ value })),
    ]);
    this._show();
  }

  /** @returns {Guide[]} @throws {FormError} where one has no picture */
  read() {
    return this._rows.map(({ name, source, values }, i) => {
      if (source) return { name, image: source.sent, ...values };
      throw new FormError(`${this._prefix}-file-${i}`, `${name} needs a picture to look at`);
    });
  }

  /** @param {Guide[]} list */
  fill(list) {
    this._rows = list.map(({ name, image, ...values }) => ({
      name,
      source: sourceOf(image),
      values,
    }));
    this._show();
  }

  _add() {
    return select(`${this._prefix}-add`);
  }

  _show() {
    this._add().disabled = this._rows.length >= this._most || this._add().options.length < 2;
    byId(this.field).replaceChildren(...this._rows.map((row, i) => this._item(row, i)));
    byId("form").dispatchEvent(new Event("change"));
  }

  /**
   * @param {Row} row
   * @param {number} place
   */
  _item(row, place) {
    const take = async (/** @type {File | undefined} */ file) => {
      if (!file) return;
      try {
        row.source = await sourceOfFile(file);
        this._show();
      } catch (error) {
        complain(error);
      }
    };
    const drop = () => {
      this._rows = this._rows.filter((one) => one !== row);
      this._show();
      this._add().focus();
    };
    const file = make("input", {
      id: `${this._prefix}-file-${place}`,
      type: "file",
      accept: "image/png,image/jpeg,image/webp",
      "aria-label": `Picture for ${row.name}`,
      onchange: (/** @type {Event} */ event) =>
        void take(/** @type {HTMLInputElement} */ (event.target).files?.[0]),
    });
    const numbers = this._settings.filter(([, schema]) => !schema.enum);
    const words = this._settings.filter(([, schema]) => schema.enum);
    const item = make(
      "li",
      { className: "guide" },
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
          ? make("img", { src: row.source.url, alt: `Picture of ${row.name}` })
          : make("span", { className: "quiet small" }, "Drop a picture here, or choose one:"),
        file,
      ),
      make(
        "div",
        { className: "row numbers" },
        ...numbers.map(([name, schema]) => labelled(name, numberBox(row, name, schema))),
      ),
      ...words.map(([name, schema]) => labelled(name, wordBox(row, name, schema))),
    );
    whenDropped(item, take);
    return item;
  }
}

/** @param {string} name @param {HTMLElement} box */
const labelled = (name, box) => make("label", {}, LABELS[name] ?? name, box);

/** @param {Row} row @param {string} name */
const named = (row, name) => ({ "aria-label": `${LABELS[name] ?? name} of ${row.name}` });

/** @param {Row} row @param {string} name @param {any} schema */
function numberBox(row, name, schema) {
  return make("input", {
    ...named(row, name),
    type: "number",
    min: String(schema.minimum ?? ""),
    max: String(schema.maximum ?? ""),
    step: "0.05",
    value: String(row.values[name]),
    oninput: (/** @type {Event} */ event) => {
      const box = /** @type {HTMLInputElement} */ (event.target);
      const { rangeOverflow, rangeUnderflow } = box.validity;
      if (box.value !== "" && !rangeOverflow && !rangeUnderflow)
        row.values[name] = Number(box.value);
    },
  });
}

/** @param {Row} row @param {string} name @param {any} schema */
function wordBox(row, name, schema) {
  const box = make(
    "select",
    {
      ...named(row, name),
      onchange: () => {
        row.values[name] = box.value;
      },
    },
    ...schema.enum.map((/** @type {string} */ value) =>
      make("option", { value }, MADE[value] ?? value),
    ),
  );
  box.value = String(row.values[name]);
  return box;
}

const KINDS = [
  new Guides("controls", "control", "Control", "controlnets"),
  new Guides("image_prompts", "ip", "ImagePrompt", "ip_adapters"),
];

export function setUpGuides() {
  for (const kind of KINDS) kind.setUp();
}

/**
 * @param {(kind: string) => string[]} names of the networks of a kind
 * @param {Record<string, any>} schemas of the OpenAPI document
 */
export function offerGuides(names, schemas) {
  for (const kind of KINDS) kind.offer(names(kind.networks), schemas);
}

/**
 * The fields of a Draw, where there are any.
 * @returns {Partial<Draw>}
 * @throws {FormError} where one has no picture
 */
export function guideFields() {
  const found = KINDS.map((kind) => /** @type {const} */ ([kind.field, kind.read()]));
  return Object.fromEntries(found.filter(([, list]) => list.length));
}

/** @param {Draw} draw */
export function fillGuides(draw) {
  for (const kind of KINDS) kind.fill(draw[kind.field] ?? []);
}
