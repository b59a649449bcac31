// Shapes of pictures: sizes of about as many pixels as a model was made for. Nothing here knows the page.

const MULTIPLE = 8; // of pixels, which the server asks for
const FINE = 64; // what models were trained on, where the picture is large enough for it

/** Words, and width by height. @type {[string, number][]} */
export const SHAPES = [
  ["1:1", 1],
  ["4:3", 4 / 3],
  ["3:4", 3 / 4],
  ["16:9", 16 / 9],
  ["9:16", 9 / 16],
];

/**
 * The size of a shape.
 * @param {number} ratio width by height
 * @param {number} width that the model was made for
 * @param {number} height likewise
 * @returns {[number, number]}
 */
export function sizeOf(ratio, width, height) {
  const multiple = Math.min(width, height) >= 512 ? FINE : MULTIPLE;
  const pixels = width * height;
  const side = (/** @type {number} */ length) =>
    Math.max(64, Math.round(length / multiple) * multiple);
  return [side(Math.sqrt(pixels * ratio)), side(Math.sqrt(pixels / ratio))];
}
