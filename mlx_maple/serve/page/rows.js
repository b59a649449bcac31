// The form's rows, made of fields.js: a label, a control, for some numbers a slider beside it.

import { byId, input, make } from "./dom.js";
import { FIELDS, fieldOf } from "./fields.js";

/** @typedef {import("./fields.js").Field} Field */

/** Put the rows where the page names them; first of all, since others look for them. */
export function buildRows() {
  for (const box of /** @type {NodeListOf<HTMLElement>} */ (
    document.querySelectorAll("[data-rows]")
  )) {
    const names = (box.dataset.rows ?? "").trim().split(/\s+/);
    box.append(...names.map((name) => row(name, FIELDS[name])));
  }
  byId("form").addEventListener("input", showSliders);
}

/**
 * Hide the rows that this server or model does not take, and add those that it takes beside them.
 * @param {Record<string, any>} properties of a drawing, as the OpenAPI document has them
 */
export function fitRows(properties) {
  for (const element of rowElements()) {
    element.dataset.taken = String(Object.hasOwn(properties, element.dataset.field ?? ""));
  }
  for (const [name, schema] of Object.entries(properties)) {
    if (name === "previews" || document.getElementById(name)) continue;
    const field = fieldOf(name, schema);
    if (field) byId("advanced").append(row(name, field));
  }
  showFamily("");
}

/**
 * Show the rows that models of a family take.
 * @param {string} family
 */
export function showFamily(family) {
  for (const element of rowElements()) {
    const families = FIELDS[element.dataset.field ?? ""]?.families;
    const fits = !families || families.some((one) => family.startsWith(one));
    element.hidden = element.dataset.taken === "false" || !fits;
  }
}

/** Sliders stand where their numbers are, or would be. */
export function showSliders() {
  for (const slider of /** @type {NodeListOf<HTMLInputElement>} */ (
    document.querySelectorAll("input[data-of]")
  )) {
    const number = input(slider.dataset.of ?? "");
    slider.value = number.value || number.placeholder || slider.min;
    slider.classList.toggle("unset", number.value === "");
  }
}

function rowElements() {
  return /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-field]"));
}

/**
 * @param {string} name
 * @param {Field} field
 */
function row(name, field) {
  return make(
    "div",
    { className: field.slider ? "field wide" : "field", "data-field": name },
    make("label", { for: name, title: field.title ?? "" }, field.label),
    field.slider
      ? make(
          "div",
          { className: "joined" },
          slider(name, field.slider, field),
          control(name, field),
        )
      : control(name, field),
  );
}

/**
 * @param {string} name
 * @param {Field} field
 */
function control(name, field) {
  if (field.kind === "picture") {
    return make("input", { id: name, type: "file", accept: "image/png,image/jpeg,image/webp" });
  }
  const common = { id: name, name, title: field.title ?? "" };
  if (field.kind === "word" || field.kind === "flag") {
    const options = field.options ?? (field.kind === "flag" ? FLAG : []);
    const usual = `${field.usual ?? "the model's own"} · usual`;
    return make(
      "select",
      { ...common, "data-kind": field.isNumber ? "choice" : field.kind },
      make("option", { value: "" }, usual),
      ...options.map(([value, label]) => make("option", { value }, label)),
    );
  }
  const hint = { placeholder: field.usual ?? "" };
  if (field.kind === "seed") {
    return make("input", { ...common, ...hint, inputMode: "numeric", maxLength: 21 });
  }
  if (field.kind === "text") return make("input", { ...common, ...hint, maxLength: 20_000 });
  return make("input", {
    ...common,
    ...hint,
    type: "number",
    inputMode: field.kind === "whole" ? "numeric" : "decimal",
    ...(field.low !== undefined && { min: String(field.low) }),
    ...(field.high !== undefined && { max: String(field.high) }),
    step: field.step ? String(field.step) : field.kind === "whole" ? "1" : "any",
  });
}

/** @type {[string, string][]} */
const FLAG = [
  ["true", "yes"],
  ["false", "no"],
];

/**
 * For the pointer only: the number beside it is what the keys and screen readers use.
 * @param {string} name
 * @param {[number, number]} range
 * @param {Field} field
 */
function slider(name, [low, high], field) {
  const move = (/** @type {Event} */ event) => {
    input(name).value = /** @type {HTMLInputElement} */ (event.target).value;
    input(name).dispatchEvent(new Event("change", { bubbles: true }));
  };
  return make("input", {
    type: "range",
    min: String(low),
    max: String(high),
    step: String(field.step ?? 1),
    tabIndex: -1,
    "aria-hidden": "true",
    "data-of": name,
    oninput: move,
  });
}
