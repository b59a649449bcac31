// The user's word lists for __name__ in prompts; this browser keeps them.

import { byId, input, keep, kept, make } from "./dom.js";
import { linesIn } from "./prompts.js";
import { toast } from "./say.js";

/** @returns {Record<string, string>} the lists as they were written */
const texts = () => kept("lists") ?? {};

export function setUpLists() {
  byId("list-keep").addEventListener("click", () => {
    const name = input("list-name")
      .value.trim()
      .replace(/^__|__$/g, "");
    if (!/^[\p{L}\p{N}][\p{L}\p{N}/ -]*(_[\p{L}\p{N}/ -]+)*$/u.test(name)) {
      return toast("The name of a list is made of letters, digits, spaces and single _.");
    }
    if (!linesIn(input("list-lines").value).length) return toast("The list has no lines.");
    keep("lists", { ...texts(), [name]: input("list-lines").value });
    input("list-name").value = input("list-lines").value = "";
    show();
    toast(`Kept: write __${name}__ in a prompt.`);
  });
  show();
}

function show() {
  byId("lists").replaceChildren(
    ...Object.entries(texts()).map(([name, text]) => {
      const edit = () => {
        input("list-name").value = name;
        input("list-lines").value = text;
        input("list-lines").focus();
      };
      const drop = () => {
        const { [name]: gone, ...others } = texts();
        keep("lists", others);
        show();
      };
      return make(
        "li",
        {},
        make("span", { className: "text" }, `__${name}__ (${linesIn(text).length})`),
        make("button", { type: "button", "aria-label": `Change ${name}`, onclick: edit }, "Change"),
        make("button", { type: "button", "aria-label": `Delete ${name}`, onclick: drop }, "Delete"),
      );
    }),
  );
}
