// Settings under a name, kept by the server.

import * as api from "./api.js";
import { button, byId, select, setOptions } from "./dom.js";
import { fill, read } from "./form.js";
import { ask, complain, toast } from "./say.js";

/** @type {import("./types.js").Preset[]} */
let presets = [];

export async function setUpPresets() {
  select("preset").addEventListener("change", use);
  byId("preset-save").addEventListener("click", () => save().catch(complain));
  byId("preset-delete").addEventListener("click", () => forget().catch(complain));
  await refresh();
}

async function refresh() {
  ({ presets } = await api.get("/presets"));
  setOptions(select("preset"), [
    { value: "", label: "Presets…" },
    ...presets.map(({ name }) => ({ value: name, label: name })),
  ]);
  button("preset-delete").disabled = !select("preset").value;
}

function use() {
  const preset = presets.find(({ name }) => name === select("preset").value);
  button("preset-delete").disabled = !preset;
  if (!preset) return;
  // A preset without a prompt changes how it is drawn, not what.
  const prompt = preset.draw.prompt || /** @type {HTMLTextAreaElement} */ (byId("prompt")).value;
  const left = fill({ ...preset.draw, prompt });
  if (left.length) toast(`Of this preset, ${left.join(", ")}.`);
}

async function save() {
  const draw = read();
  const name = await ask("Name of the preset", select("preset").value);
  if (!name) return;
  await api.put(`/presets/${encodeURIComponent(name)}`, draw);
  await refresh();
  select("preset").value = name;
  button("preset-delete").disabled = false;
  toast(`Kept as “${name}”.`);
}

async function forget() {
  const name = select("preset").value;
  if (!name) return;
  await api.remove(`/presets/${encodeURIComponent(name)}`);
  await refresh();
  toast(`“${name}” is deleted.`);
}
