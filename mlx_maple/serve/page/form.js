// The form as a Draw, and a Draw as the form.

import * as api from "./api.js";
import { byId, input, isPressed, keep, kept, make, select, setOptions, setPressed } from "./dom.js";
import { FIELDS, labelOf } from "./fields.js";
import { fillGuides, offerGuides } from "./guides.js";
import { fillLoras, loraFields, offerLoras } from "./loras.js";
import { fitRows, showFamily, showSliders } from "./rows.js";
import { FormError, toast } from "./say.js";
import { isSeed, rollSeed } from "./seeds.js";
import { sizeOf, SHAPES } from "./shapes.js";
import { fillStart, hasStart } from "./start.js";

/** @typedef {import("./types.js").Draw} Draw */

// Of a drawing, but not a field of this form.
const BESIDE = ["image", "mask", "depth_image", "loras", "controls", "image_prompts", "previews"];

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
  byId("seed-dice").addEventListener("click", () => {
    input("seed").value = rollSeed();
    setLock(true); // what is shown is drawn with
  });
  byId("seed-lock").addEventListener("click", () => setLock(!isPressed(byId("seed-lock"))));
  input("seed").addEventListener("input", () => setLock(input("seed").value.trim() !== ""));
  byId("swap").addEventListener("click", swapSize);
  byId("reset").addEventListener("click", () => {
    fill({ prompt: input("prompt").value });
    fillGuides({ prompt: "" });
  });
  select("sampler").addEventListener("change", showSchedules);
  select("model").addEventListener("change", () => void showModel());
  byId("form").addEventListener("change", () => {
    showCounts();
    askForPlan();
  });
  const settings = /** @type {HTMLDetailsElement} */ (byId("settings"));
  settings.open = kept("settings") === true;
  settings.addEventListener("toggle", () => {
    keep("settings", settings.open);
    askForPlan();
  });
  byId("models-again").addEventListener("click", () => {
    lookAgain().catch((error) => toast(String(error.message ?? error)));
  });
  setUpShapes();
  const [schemas, list, known, networks] = await Promise.all([
    api.schemas(),
    api.get("/models"),
    api.get("/samplers"),
    api.get("/networks"),
  ]);
  if (schemas.Draw) fitRows(schemas.Draw.properties);
  ({ samplers, schedules } = known);
  setOptions(select("noise"), own("torch", known.noise));
  setNetworks(networks, schemas);
  setModels(list);
  await showModel();
}

/** What was put into the model folders since. */
async function lookAgain() {
  const [list, networks, schemas] = await Promise.all([
    api.post("/models/refresh"),
    api.get("/networks"),
    api.schemas(),
  ]);
  setNetworks(networks, schemas);
  setModels(list);
  await showModel();
  const count = models.filter((model) => model.is_here).length;
  toast(count === 1 ? "One model is here." : `${count} models are here.`);
}

/**
 * @param {Record<string, {name: string}[]>} networks
 * @param {Record<string, any>} schemas of the OpenAPI document
 */
function setNetworks(networks, schemas) {
  const names = (/** @type {string} */ kind) => (networks[kind] ?? []).map(({ name }) => name);
  setOptions(select("vae"), own("the model's own", names("vaes")));
  setOptions(select("taesd"), own("none", names("taesds")));
  setOptions(select("unet"), own("the model's own", names("unets")));
  const built = (FIELDS.hires_upscaler.options ?? []).map(([value, label]) => ({ value, label }));
  setOptions(select("hires_upscaler"), [
    ...own(FIELDS.hires_upscaler.usual, []),
    ...built,
    ...plain(names("upscalers")),
  ]);
  offerGuides(names, schemas);
  offerLoras(names("loras"));
}

/** @param {string[]} values */
const plain = (values) => values.map((value) => ({ value, label: value }));
/** @param {string | number | undefined} usual @param {string[]} values */
const own = (usual, values) => [
  { value: "", label: `${usual ?? "the model's own"} · usual` },
  ...plain(values),
];

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
  const others = models.filter((model) => model.is_here && model.id !== defaultModel);
  setOptions(
    select("refiner"),
    own(
      "none",
      others.map((model) => model.id),
    ),
  );
}

/** The model's own values, as hints in the empty fields. */
async function showModel() {
  const id = select("model").value || defaultModel;
  const model = models.find((one) => one.id === id);
  byId("model-note").textContent = model?.note ?? "";
  let family = "";
  try {
    const detail = await api.get(`/models/${id.split("/").map(encodeURIComponent).join("/")}`);
    if (id !== (select("model").value || defaultModel)) return; // another was chosen meanwhile
    defaults = detail.defaults ?? {};
    ({ family } = detail);
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
  showFamily(family);
  for (const [name, field] of Object.entries(FIELDS)) {
    if (field.kind !== "number" && field.kind !== "whole") continue;
    input(name).placeholder = String(defaults[name] ?? field.usual ?? "");
  }
  setOptions(
    select("sampler"),
    own(
      defaults.sampler,
      samplers.map((sampler) => sampler.id),
    ),
  );
  showSchedules();
  showShape();
  showSliders();
}

/** Only the schedules that the sampler takes. */
function showSchedules() {
  const chosen = select("sampler").value;
  const sampler = samplers.find((one) => one.id === (chosen || defaults.sampler));
  const usual = chosen && chosen !== defaults.sampler ? sampler?.schedules[0] : defaults.schedule;
  setOptions(select("schedule"), own(usual, sampler?.schedules ?? schedules));
  input("eta").disabled = sampler ? !sampler.has_eta : false;
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
    if (field.name === "seed" && !isPressed(byId("seed-lock"))) continue; // the last drawing's
    const words = labelOf(field.name);
    if (field instanceof HTMLInputElement && field.type === "number") {
      if (field.validity.badInput) throw new FormError(field.name, `${words}: not a number`);
      if (text === "") continue;
      const value = Number(text);
      if (field.validity.rangeUnderflow || field.validity.rangeOverflow) {
        throw new FormError(field.name, `${words}: from ${field.min} to ${field.max}`);
      }
      if (field.validity.stepMismatch && FIELDS[field.name]?.kind === "whole") {
        throw new FormError(field.name, `${words}: a multiple of ${field.step}`);
      }
      draw[field.name] = value;
    } else if (/seed$/.test(field.name)) {
      if (text.trim() && !isSeed(text.trim())) {
        throw new FormError(field.name, `${words}: a whole number`);
      }
      if (text.trim()) draw[field.name] = text.trim();
    } else if (field.dataset.kind === "flag" && text) draw[field.name] = text === "true";
    else if (field.dataset.kind === "choice" && text) draw[field.name] = Number(text);
    else if (text !== "") draw[field.name] = text;
  }
  draw.prompt = input("prompt").value;
  return { ...draw, ...loraFields() };
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
  const model = draw.model ? modelCalled(draw.model) : defaultModel;
  select("model").value = model === defaultModel ? "" : (model ?? "");
  if (model === undefined) left.push(`the model ${draw.model} is not here`);
  delete rest.model;
  select("sampler").value = String(draw.sampler ?? "");
  showSchedules();
  for (const field of fields()) {
    if (field.name === "model") continue;
    const value = draw[field.name];
    field.value = Array.isArray(value) ? value.join(" ") : String(value ?? "");
    if (value !== undefined && value !== null && field.value === "")
      left.push(`${field.name} ${value}`);
    delete rest[field.name];
  }
  if (!keepSeed) input("seed").value = "";
  setLock(input("seed").value !== "");
  fillLoras(draw.loras ?? []);
  for (const name of BESIDE) delete rest[name];
  carried = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== null));
  showCarried();
  showSliders();
  showShape();
  showCounts();
  void showModelKeeping(draw);
  askForPlan();
  return left;
}

/**
 * The model that a picture names: by its id, or by its file's name alone.
 * @param {string} name
 */
function modelCalled(name) {
  const here = models.filter((model) => model.is_here).map((model) => model.id);
  return here.find((id) => id === name) ?? here.find((id) => id.split("/").pop() === name);
}

/** The pictures of a drawing into the form, or none of them. @param {Draw} draw */
export function fillPictures(draw) {
  fillStart(draw);
  fillGuides(draw);
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

/** How many settings each folded part holds that are not the usual ones. */
function showCounts() {
  for (const box of /** @type {NodeListOf<HTMLElement>} */ (
    document.querySelectorAll("#settings > details")
  )) {
    const set = [...box.querySelectorAll("[name]")].filter(
      (field) => /** @type {HTMLInputElement} */ (field).value !== "",
    ).length;
    const rows = box.querySelectorAll("ul > li:not(#lists > li)").length;
    const summary = /** @type {HTMLElement} */ (box.querySelector("summary"));
    summary.dataset.count = set + rows ? String(set + rows) : "";
  }
}

// Size --------------------------------------------------------------------------------------------

function setUpShapes() {
  byId("shapes").append(
    ...SHAPES.map(([words, ratio]) => {
      const choose = () => {
        const size = sizeOf(ratio, Number(defaults.width) || 512, Number(defaults.height) || 512);
        [input("width").value, input("height").value] = size.map(String);
        showShape();
        askForPlan();
      };
      return make(
        "button",
        { type: "button", "aria-pressed": "false", "data-ratio": String(ratio), onclick: choose },
        words,
      );
    }),
  );
  for (const name of ["width", "height"]) input(name).addEventListener("input", showShape);
}

/** Press the shape that the size has. */
function showShape() {
  const [width, height] = ["width", "height"].map(
    (name) => input(name).value || input(name).placeholder,
  );
  const [across, down] = [Number(defaults.width) || 512, Number(defaults.height) || 512];
  for (const button of /** @type {NodeListOf<HTMLElement>} */ (
    byId("shapes").querySelectorAll("button")
  )) {
    const size = sizeOf(Number(button.dataset.ratio), across, down);
    setPressed(button, size.join() === `${width},${height}`);
  }
}

function swapSize() {
  const [width, height] = [input("width"), input("height")];
  [width.value, height.value] = [
    height.value || height.placeholder,
    width.value || width.placeholder,
  ];
  showShape();
  askForPlan();
}

// Memory ------------------------------------------------------------------------------------------

/** Ask whether the drawing fits in memory, a moment after the last change. */
export function askForPlan() {
  clearTimeout(planTimer);
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
    // Where the settings are folded, what does not fit is said beside the button.
    byId("no-room").textContent = plan.fits === false ? box.textContent : "";
  } catch (error) {
    if (mine !== planNumber) return;
    box.textContent = error instanceof FormError ? error.message : "";
    box.classList.toggle("problem", error instanceof FormError);
  }
}
