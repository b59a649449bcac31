// X/Y grids: the values of two settings, and a drawing for each pair. Nothing here knows the page.

import { FIELDS } from "./fields.js";

/**
 * @typedef {import("./types.js").Draw} Draw
 * @typedef {{id: string, label: string, kind: import("./fields.js").Field["kind"] | "replace",
 *   hint?: string, low?: number, high?: number, isNumber?: boolean}} Axis
 */

export const MOST_VALUES = 32; // of one axis

const WORDS = ["word", "replace", "text"];

/** Every setting that is one value, and what is not a setting by itself. @type {Axis[]} */
export const AXES = [
  ...Object.entries(FIELDS)
    // Each cell is one picture; what has no hint is no value of a list.
    .filter(([id, field]) => id !== "count" && field.hint)
    .map(([id, field]) => ({ id, ...field })),
];
AXES.splice(
  5,
  0,
  { id: "prompt", label: "Words in the prompt", kind: "replace", hint: "red, green, blue" },
  { id: "lora", label: "Weight of the first LoRA", kind: "number", hint: "0-1 (+0.25)" },
  { id: "control", label: "Weight of the first ControlNet", kind: "number", hint: "0-1 (+0.5)" },
);

/** A grid that cannot be drawn; the message is for the reader. */
export class GridError extends Error {}

/**
 * The axis of a setting.
 * @param {string} id
 * @returns {Axis}
 */
export function axisOf(id) {
  const axis = AXES.find((one) => one.id === id);
  if (!axis) throw new GridError(`"${id}" is no setting that a grid takes`);
  return axis;
}

/**
 * The values that a text lists: "4, 8", "1-5", "1-9 (+2)" (a step), "0-1 [5]" (so many), as A1111
 * writes them; words with commas go in double quotes.
 * @param {Axis} axis
 * @param {string} text
 * @returns {string[]}
 * @throws {GridError} in one line
 */
export function valuesOf(axis, text) {
  const items = splitList(text);
  const isWords = WORDS.includes(axis.kind) || axis.kind === "flag";
  const values = isWords ? items : items.flatMap(numbersOf);
  if (!values.length) throw new GridError(`${axis.label}: no values`);
  if (values.length > MOST_VALUES) {
    throw new GridError(`${axis.label}: ${values.length} values, ${MOST_VALUES} at most`);
  }
  for (const value of values) check(axis, value);
  return values;
}

/**
 * Items between commas; quotes keep a comma.
 * @param {string} text
 * @returns {string[]}
 */
export function splitList(text) {
  const items = text.match(/\s*"(?:[^"]|"")*"\s*|[^,]+/g) ?? [];
  return items
    .map((item) => item.trim())
    .map((item) => (/^".*"$/s.test(item) ? item.slice(1, -1).replaceAll('""', '"') : item))
    .filter((item) => item !== "");
}

/**
 * A number, or the numbers of a range.
 * @param {string} item
 * @returns {string[]}
 */
function numbersOf(item) {
  const number = String.raw`-?\d+(?:\.\d+)?`;
  const range = new RegExp(
    String.raw`^(${number})\s*-\s*(${number})\s*(?:\(\s*([+-]\s*\d+(?:\.\d+)?)\s*\)|\[\s*(\d+)\s*\])?$`,
  ).exec(item);
  if (!range) return [item];
  const [first, last] = [Number(range[1]), Number(range[2])];
  if (range[4] !== undefined) {
    const count = Number(range[4]);
    if (count < 1 || count > MOST_VALUES)
      throw new GridError(`"${item}": 1 to ${MOST_VALUES} values`);
    if (count === 1) return [written(first)];
    return Array.from({ length: count }, (_, i) =>
      written(first + ((last - first) * i) / (count - 1)),
    );
  }
  const step = range[3] ? Number(range[3].replace(/\s/g, "")) : Math.sign(last - first) || 1;
  if (!step || (last - first) * step < 0) throw new GridError(`"${item}" leads nowhere`);
  const count = Math.floor((last - first) / step + 1e-9) + 1;
  if (count > MOST_VALUES)
    throw new GridError(`"${item}": ${count} values, ${MOST_VALUES} at most`);
  return Array.from({ length: count }, (_, i) => written(first + step * i));
}

/**
 * A number without the noise of its binary form.
 * @param {number} value
 */
function written(value) {
  return String(Number(value.toFixed(6)));
}

/**
 * @param {Axis} axis
 * @param {string} value
 */
function check(axis, value) {
  if (WORDS.includes(axis.kind)) return;
  if (axis.kind === "flag") {
    if (value === "true" || value === "false") return;
    throw new GridError(`${axis.label}: "${value}" is neither true nor false`);
  }
  const whole = /^-?\d+$/.test(value);
  if (axis.kind === "seed" ? !whole : !/^-?\d+(\.\d+)?$/.test(value)) {
    throw new GridError(
      `${axis.label}: "${value}" is no ${axis.kind === "seed" ? "seed" : "number"}`,
    );
  }
  if (axis.kind === "whole" && !whole)
    throw new GridError(`${axis.label}: "${value}" is not whole`);
  const number = Number(value);
  if (number < (axis.low ?? -Infinity) || number > (axis.high ?? Infinity)) {
    throw new GridError(`${axis.label}: ${value} is out of range`);
  }
}

/**
 * A drawing with one setting changed.
 * @param {Draw} draw
 * @param {Axis} axis
 * @param {string[]} values all of the axis: "prompt" replaces the first by each
 * @param {number} place which of them
 * @returns {Draw}
 * @throws {GridError} in one line
 */
export function withValue(draw, axis, values, place) {
  const value = values[place];
  if (axis.kind === "replace") {
    if (!draw.prompt.includes(values[0])) {
      throw new GridError(`"${values[0]}" is not in the prompt, so nothing can take its place`);
    }
    return { ...draw, prompt: draw.prompt.replaceAll(values[0], () => value) };
  }
  if (axis.id === "lora" || axis.id === "control") {
    const field = `${axis.id}s`;
    const [first, ...others] = /** @type {{weight: number}[]} */ (draw[field] ?? []);
    if (!first) throw new GridError(`${axis.label}: none is chosen`);
    return { ...draw, [field]: [{ ...first, weight: Number(value) }, ...others] };
  }
  const isNumber = axis.kind === "number" || axis.kind === "whole";
  const changed =
    isNumber || axis.isNumber ? Number(value) : axis.kind === "flag" ? value === "true" : value;
  const next = { ...draw, [axis.id]: changed };
  // A sampler takes schedules of its own; one that was chosen for another may not fit.
  if (axis.id === "sampler") delete next.schedule;
  return next;
}

/**
 * The drawings of a grid, row by row.
 * @param {Draw} draw
 * @param {{axis: Axis, values: string[]}} x
 * @param {{axis: Axis, values: string[]} | null} y
 * @returns {Draw[][]}
 * @throws {GridError} in one line
 */
export function cells(draw, x, y) {
  if (y && y.axis.id === x.axis.id) throw new GridError("the two settings of a grid must differ");
  // Schedule after sampler, whichever way round they lie.
  const samplerFirst = y?.axis.id === "sampler" || x.axis.id !== "sampler";
  const rows = y ? y.values.length : 1;
  return Array.from({ length: rows }, (_, row) =>
    x.values.map((_, column) => {
      const inY = (/** @type {Draw} */ d) => (y ? withValue(d, y.axis, y.values, row) : d);
      const inX = (/** @type {Draw} */ d) => withValue(d, x.axis, x.values, column);
      return { ...(samplerFirst ? inX(inY(draw)) : inY(inX(draw))), count: 1 };
    }),
  );
}
