// The LoRAs of a drawing: a row for each, with its weight.

import { byId, iconButton, make, select, setOptions } from "./dom.js";

/** @typedef {import("./types.js").Lora} Lora */

/** @type {Lora[]} */
let loras = [];

export function setUpLoras() {
  select("lora-add").addEventListener("change", () => {
    const name = select("lora-add").value;
    if (name && !loras.some((lora) => lora.name === name)) loras.push({ name, weight: 1 });
    select("lora-add").value = "";
    show();
    /** @type {HTMLElement | null} */ (byId("loras").querySelector("li:last-child input"))?.focus();
  });
}

/** @param {string[]} names of the LoRAs in the model folders */
export function offerLoras(names) {
  byId("lora-none").hidden = names.length > 0;
  setOptions(select("lora-add"), [
    { value: "", label: "choose…" },
    ...names.map((value) => ({ value })),
  ]);
  select("lora-add").disabled = !names.length;
}

/** The field of a Draw, where there are any. @returns {{loras?: Lora[]}} */
export const loraFields = () => (loras.length ? { loras: loras.map((lora) => ({ ...lora })) } : {});

/** @param {Lora[]} list */
export function fillLoras(list) {
  loras = list.map((lora) => ({ ...lora }));
  show();
}

function show() {
  byId("loras").replaceChildren(...loras.map(row));
  byId("form").dispatchEvent(new Event("change"));
}

/** @param {Lora} lora */
function row(lora) {
  const setWeight = (/** @type {Event} */ event) => {
    const box = /** @type {HTMLInputElement} */ (event.target);
    if (box.value !== "" && box.validity.valid) lora.weight = Number(box.value);
  };
  const drop = () => {
    loras = loras.filter((one) => one !== lora);
    show();
    select("lora-add").focus();
  };
  return make(
    "li",
    {},
    make("span", { className: "text" }, lora.name),
    make("input", {
      type: "number",
      min: "-4",
      max: "4",
      step: "0.05",
      value: String(lora.weight),
      "aria-label": `Weight of ${lora.name}`,
      oninput: setWeight,
    }),
    iconButton("close", `Remove ${lora.name}`, drop),
  );
}
