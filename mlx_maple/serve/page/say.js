// What the page tells its reader: notes in the corner, words for screen readers, questions.

import { byId, dialog, input, make } from "./dom.js";

/** A field that cannot be used; the message is for the reader. */
export class FormError extends Error {
  /**
   * @param {string} field
   * @param {string} message
   */
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/**
 * A note that goes by itself.
 * @param {string} text
 * @param {Record<string, () => void>} [actions] buttons by their words
 */
export function toast(text, actions = {}) {
  const note = make("div", { className: "toast" }, make("span", {}, text));
  for (const [label, act] of Object.entries(actions)) {
    const press = () => {
      note.remove();
      act();
    };
    note.append(make("button", { type: "button", onclick: press }, label));
  }
  byId("toasts").append(note);
  while (byId("toasts").children.length > 3) byId("toasts").firstElementChild?.remove();
  setTimeout(() => note.remove(), Object.keys(actions).length ? 12_000 : 6_000);
}

/**
 * Words for screen readers only.
 * @param {string} text
 */
export function announce(text) {
  byId("live").textContent = text;
}

/**
 * Under the Draw button, until the next drawing.
 * @param {string} text
 */
export function showProblem(text) {
  byId("problem").textContent = text;
}

/**
 * A failure of anything that a press of a button began.
 * @param {unknown} error
 */
export function complain(error) {
  toast(error instanceof Error ? error.message : String(error));
}

/**
 * Ask for one line.
 * @param {string} question
 * @param {string} [value] to begin with
 * @returns {Promise<string | null>} null where it was cancelled
 */
export function ask(question, value = "") {
  const box = dialog("asker");
  byId("asker-label").textContent = question;
  const line = input("asker-text");
  line.value = value;
  box.returnValue = "";
  byId("asker-cancel").onclick = () => box.close("");
  box.showModal();
  line.select();
  return new Promise((resolve) => {
    box.addEventListener(
      "close",
      () => resolve(box.returnValue === "yes" ? line.value.trim() : null),
      { once: true },
    );
  });
}
