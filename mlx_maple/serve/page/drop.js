// Pictures that are dropped on the page or pasted into it, and who takes them.

import { byId } from "./dom.js";
import { complain } from "./say.js";

/** @typedef {(file: File) => unknown} Take */

/** Elements that take pictures themselves. @type {WeakMap<Element, Take>} */
const takers = new WeakMap();
/** What takes all others. @type {(file: File) => Promise<void>} */
let takeElsewhere = async () => {};

/**
 * A picture that falls on an element is its own.
 * @param {Element} element
 * @param {Take} take
 */
export function whenDropped(element, take) {
  element.classList.add("takes");
  takers.set(element, take);
}

/** @param {typeof takeElsewhere} take a picture that was dropped on the page or pasted into it */
export function setUpDrop(take) {
  takeElsewhere = take;
  let inside = 0; // dragenter and dragleave come for every element on the way
  const show = (/** @type {number} */ change) => {
    inside = Math.max(0, inside + change);
    byId("drop").hidden = inside === 0;
    document.body.classList.toggle("dragging", inside > 0);
  };
  addEventListener("dragenter", (event) => hasFiles(event) && show(1));
  addEventListener("dragleave", (event) => hasFiles(event) && show(-1));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(-inside);
    const over = event.target instanceof Element ? event.target.closest(".takes") : null;
    hand(event.dataTransfer?.files, over && takers.get(over)).catch(complain);
  });
  addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return;
    event.preventDefault();
    hand(event.clipboardData.files).catch(complain);
  });
}

/** @param {DragEvent} event */
function hasFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}

/**
 * @param {FileList | undefined} files
 * @param {Take | null} [take]
 */
async function hand(files, take) {
  const file = [...(files ?? [])].find((one) => one.type.startsWith("image/"));
  if (!file) throw new Error("that is no picture");
  await (take ?? takeElsewhere)(file);
}
