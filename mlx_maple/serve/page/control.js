// One ControlNet: its name, the picture that it follows, how strongly, and what is made of the picture.

import { byId, image, input, select, setOptions } from "./dom.js";
import { complain, FormError } from "./say.js";
import { sourceOf } from "./start.js";

/** @type {import("./start.js").Source | null} */
let picture = null;

/** @param {string[]} names of the ControlNets in the model folders */
export function setUpControl(names) {
  byId("control-box").hidden = !names.length;
  setOptions(select("control-name"), [
    { value: "", label: "none" },
    ...names.map((value) => ({ value })),
  ]);
  input("control-file").addEventListener("change", async () => {
    const file = input("control-file").files?.[0];
    if (!file) return;
    try {
      picture = await sourceOf(file);
      image("control-shown").src = picture.url;
      image("control-shown").hidden = false;
    } catch (error) {
      complain(error);
    }
  });
}

/**
 * The field of a Draw, where a ControlNet is chosen.
 * @returns {{controls?: {name: string, image: string, weight: number, preprocess: string}[]}}
 * @throws {FormError} where it has no picture
 */
export function controlFields() {
  const name = select("control-name").value;
  if (!name) return {};
  if (!picture) throw new FormError("control-file", "The ControlNet needs a picture to follow");
  const weight = input("control-weight").value === "" ? 1 : Number(input("control-weight").value);
  const preprocess = select("control-preprocess").value;
  return { controls: [{ name, image: picture.sent, weight, preprocess }] };
}
