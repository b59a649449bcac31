// The form as a Draw, and a Draw as the form.

import * as api from "./api.js";
import { setUpControl } from "./control.js";
import { byId, input, isPressed, make, select, setOptions, setPressed } from "./dom.js";
import { FormError } from "./say.js";
import { isSeed, rollSeed } from "./seeds.js";
import { hasStart } from "./start.js";

/** @typedef {import("./types.js").Draw} Draw */

// Pictures are not filled in: the server sends `true` for them.
const PICTURES = ["image", "mask"];
// Of a drawing, but not a field of this form.
const BESIDE = [...PICTURES, "loras", "controls", "previews"];

/** @type {import("./types.js").Sampler[]} */
let samplers = [];
/** @type {string[]} */
let schedules = [];
/** @type {import("./types.js").Model[]} */
let models = [];
let defaultModel = "";
/** What the model draws with where nothing is said. @type {Record<string, string | number>} */
let defaults = {};
/** Settings that came with a picture and have no field here. @type {Record<string, unknown>} */
let carried = {};
/** @type {import("./types.js").Lora[]} */
let loras = [];
let takesLoras = false;
let planTimer = 0;

/** Elements of the form that are fields of a Draw. */
function fields() {
  const form = /** @type {HTMLFormElement} */ (byId("form"));
  return /** @type {(HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement)[]} */ (
    [...form.elements].filter((element) => "name" in element && element.name)
  );
}

/** Connect the form, and fill its choices from the server. */
export async function setUpForm() {
  byId("seed-dice").addEventListener("click", () => (input("seed").value = rollSeed()));
  byId("seed-lock").addEventListener("click", () => setLock(!isPressed(byId("seed-lock"))));
  input("seed").addEventListener("input", () => setLock(input("seed").value.trim() !== ""));
  byId("swap").addEventListener("click", swapSize);
  byId("reset").addEventListener("click", () => fill({ prompt: input("prompt").value }));
  select("sampler").addEventListener("change", showSchedules);
  select("model").addEventListener("change", () => void showModel());
  select("lora-add").addEventListener("change", addLora);
  byId("form").addEventListener("change", askForPlan);
  byId("settings").addEventListener("toggle", askForPlan);
  const [found, list, known, networks, system] = await Promise.all([
    api.drawFields(),
    api.get("/models"),
    api.get("/samplers"),
    api.get("/networks"),
    api.get("/system"),
  ]);
  for (const element of /** @type {NodeListOf<HTMLElement>} */ (
    document.querySelectorAll("[data-field]")
  )) {
    element.hidden = !found.has(element.dataset.field ?? "");
  }
  takesLoras = system.features.includes("loras");
  ({ samplers, schedules } = known);
  setLimits(system.limits);
  setOptions(select("noise"), own("torch", known.noise));
  setOptions(select("vae"), own("the model's", names(networks.vaes)));
  setUpControl(names(networks.controlnets));
  setOptions(select("lora-add"), [
    { value: "", label: "choose…" },
    ...plain(names(networks.loras)),
  ]);
  byId("lora-box").hidden = !networks.loras.length;
  setModels(list);
  await showModel();
}

/** @param {{name: string}[]} items */
const names = (items) => items.map((item) => item.name);
/** @param {string[]} values */
const plain = (values) => values.map((value) => ({ value, label: value }));
/** @param {string | number | undefined} usual @param {string[]} values */
const own = (usual, values) => [
  { value: "", label: usual === undefined ? "the model's own" : `usual: ${usual}` },
  ...plain(values),
];

/** @param {Record<string, any>} limits */
function setLimits(limits) {
  for (const name of ["width", "height", "steps", "count"]) {
    [input(name).min, input(name).max] = limits[name].map(String);
  }
}

/** @param {{default: string, models: import("./types.js").Model[]}} list */
function setModels(list) {
  ({ models, default: defaultModel } = list);
  setOptions(
    select("model"),
    models.map((model) => ({
      value: model.id === defaultModel ? "" : model.id,
      label: model.is_here ? model.name : `${model.name} (not here yet)`,
      disabled: !model.is_here,
    })),
  );
}

/** The model's own values, as hints in the empty fields. */
async function showModel() {
  const id = select("model").value || defaultModel;
  const model = models.find((one) => one.id === id);
  byId("model-note").textContent = model?.note ?? "";
  try {
    const detail = await api.get(`/models/${id.split("/").map(encodeURIComponent).join("/")}`);
    if (id !== (select("model").value || defaultModel)) return; // another was chosen meanwhile
    defaults = detail.defaults ?? {};
    const parts = [
      model?.note,
      model?.license && `licence: ${model.license}`,
      ...(detail.notes ?? []),
    ];
    byId("model-note").textContent = parts.filter(Boolean).join(" · ");
  } catch (error) {
    defaults = {};
    byId("model-note").textContent = error instanceof Error ? error.message : "";
  }
  for (const name of ["width", "height", "steps", "guidance_scale"]) {
    input(name).placeholder = String(defaults[name] ?? "");
  }
  setOptions(
    select("sampler"),
    own(
      defaults.sampler,
      samplers.map((sampler) => sampler.id),
    ),
  );
  showSchedules();
}

/** Only the schedules that the sampler takes. */
function showSchedules() {
  const chosen = select("sampler").value;
  const sampler = samplers.find((one) => one.id === (chosen || defaults.sampler));
  const usual = chosen && chosen !== defaults.sampler ? sampler?.schedules[0] : defaults.schedule;
  setOptions(select("schedule"), own(usual, sampler?.schedules ?? schedules));
  input("eta").disabled = sampler ? !sampler.has_eta : false;
}

function swapSize() {
  const [width, height] = [input("width"), input("height")];
  [width.value, height.value] = [
    height.value || height.placeholder,
    width.value || width.placeholder,
  ];
  askForPlan();
}

/** @param {boolean} is */
function setLock(is) {
  setPressed(byId("seed-lock"), is);
}

/**
 * The seed to draw with: the one that is kept, else a new one, which is then shown.
 * @returns {string}
 */
export function takeSeed() {
  const box = input("seed");
  if (!isPressed(byId("seed-lock")) || !box.value.trim()) box.value = rollSeed();
  return box.value.trim();
}

/**
 * What the form says, without pictures and without a seed of its own.
 * @returns {Draw}
 * @throws {FormError}
 */
export function read() {
  /** @type {Draw} */
  const draw = { ...carried, prompt: "" };
  for (const field of fields()) {
    const text = field.value;
    if (field.closest("[data-field][hidden]") || (field.disabled && field.name === "eta")) continue;
    if (field instanceof HTMLInputElement && field.type === "number") {
      if (field.validity.badInput)
        throw new FormError(field.name, `${labelOf(field)}: not a number`);
      if (text === "") continue;
      const value = Number(text);
      if (field.validity.rangeUnderflow || field.validity.rangeOverflow) {
        throw new FormError(field.name, `${labelOf(field)}: from ${field.min} to ${field.max}`);
      }
      if (field.validity.stepMismatch && field.step !== "any" && Number(field.step) >= 1) {
        throw new FormError(field.name, `${labelOf(field)}: a multiple of ${field.step}`);
      }
      draw[field.name] = value;
    } else if (/seed$/.test(field.name)) {
      if (text.trim() && !isSeed(text.trim())) {
        throw new FormError(field.name, `${labelOf(field)}: a whole number`);
      }
      if (text.trim()) draw[field.name] = text.trim();
    } else if (text !== "") draw[field.name] = text;
  }
  draw.prompt = input("prompt").value;
  if (loras.length) addLoras(draw);
  return draw;
}

/**
 * As a field where the server takes one, else in A1111's words in the prompt.
 * @param {Draw} draw
 */
function addLoras(draw) {
  if (takesLoras) draw.loras = loras.map((lora) => ({ ...lora }));
  else draw.prompt += loras.map(({ name, weight }) => ` <lora:${name}:${weight}>`).join("");
}

/** @param {Element} field */
function labelOf(field) {
  return document.querySelector(`label[for="${field.id}"]`)?.textContent ?? field.id;
}

/**
 * Show where the form is wrong: its box opens and takes the focus.
 * @param {string} name of a field of a Draw, which is its id too
 */
export function pointAt(name) {
  const field = document.getElementById(name.split(".")[0]);
  if (!field) return;
  for (
    let box = field.closest("details");
    box;
    box = box.parentElement?.closest("details") ?? null
  ) {
    box.open = true;
  }
  field.focus();
}

/**
 * Fill the form; what the drawing does not say goes back to the model's own.
 * @param {Draw} draw
 * @param {{keepSeed?: boolean}} [how]
 * @returns {string[]} what could not be filled in
 */
export function fill(draw, { keepSeed = true } = {}) {
  const left = [];
  const rest = { ...draw };
  const model = draw.model === defaultModel ? "" : (draw.model ?? "");
  select("model").value = [...select("model").options].some((o) => o.value === model && !o.disabled)
    ? model
    : "";
  if (select("model").value !== model) left.push(`the model ${draw.model} is not here`);
  delete rest.model;
  select("sampler").value = String(draw.sampler ?? "");
  showSchedules();
  for (const field of fields()) {
    if (field.name === "model") continue;
    const value = draw[field.name];
    field.value = value === undefined || value === null ? "" : String(value);
    if (value !== undefined && value !== null && field.value === "")
      left.push(`${field.name} ${value}`);
    delete rest[field.name];
  }
  if (!keepSeed) input("seed").value = "";
  setLock(input("seed").value !== "");
  loras = (draw.loras ?? []).map((lora) => ({ ...lora }));
  for (const name of BESIDE) delete rest[name];
  carried = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== null));
  showLoras();
  showCarried();
  void showModelKeeping(draw);
  askForPlan();
  return left;
}

/**
 * The hints of another model come later; the choices that depend on them stay.
 * @param {Draw} draw
 */
async function showModelKeeping(draw) {
  await showModel();
  for (const name of ["sampler", "schedule"]) {
    if (draw[name]) select(name).value = String(draw[name]);
    if (name === "sampler") showSchedules();
  }
}

function showCarried() {
  const box = byId("carried");
  const words = Object.entries(carried).map(([name, value]) => `${name} ${JSON.stringify(value)}`);
  box.hidden = !words.length;
  const drop = () => {
    carried = {};
    showCarried();
  };
  box.replaceChildren(
    `Also: ${words.join(", ")} `,
    make("button", { type: "button", onclick: drop }, "Leave out"),
  );
}

function addLora() {
  const name = select("lora-add").value;
  if (name && !loras.some((lora) => lora.name === name)) loras.push({ name, weight: 1 });
  select("lora-add").value = "";
  showLoras();
}

function showLoras() {
  byId("loras").replaceChildren(
    ...loras.map((lora) => {
      const setWeight = (/** @type {Event} */ event) => {
        const box = /** @type {HTMLInputElement} */ (event.target);
        if (box.value !== "" && box.validity.valid) lora.weight = Number(box.value);
      };
      const drop = () => {
        loras = loras.filter((one) => one !== lora);
        showLoras();
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
        make(
          "button",
          { type: "button", "aria-label": `Remove ${lora.name}`, onclick: drop },
          "Remove",
        ),
      );
    }),
  );
}

/** Ask whether the drawing fits in memory, a moment after the last change. */
export function askForPlan() {
  clearTimeout(planTimer);
  if (!(/** @type {HTMLDetailsElement} */ (byId("settings")).open)) return;
  planTimer = window.setTimeout(showPlan, 350);
}

let planNumber = 0;

async function showPlan() {
  const box = byId("plan");
  const mine = ++planNumber;
  try {
    const { model, width, height, count, guidance_scale } = read();
    const plan = await api.post("/plan", {
      model,
      width,
      height,
      count,
      guidance_scale,
      ...(hasStart() && { image: true }),
    });
    if (mine !== planNumber) return;
    const verdict = plan.fits === null ? "" : plan.fits ? "Fits: " : "Does not fit: ";
    box.textContent =
      verdict + [plan.message, ...(plan.fits === false ? plan.advice : [])].join("; ");
    box.classList.toggle("problem", plan.fits === false);
  } catch (error) {
    if (mine !== planNumber) return;
    box.textContent = error instanceof FormError ? error.message : "";
    box.classList.toggle("problem", error instanceof FormError);
  }
}
