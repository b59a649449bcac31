// Elements by id, and new ones from data. Text goes in as text: nothing here parses HTML.

/**
 * The element with this id; a missing one is a fault of this page.
 * @template {HTMLElement} [T=HTMLElement]
 * @param {string} id
 * @returns {T}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element #${id}`);
  return /** @type {T} */ (found);
}

/** @param {string} id */
export const button = (id) => /** @type {HTMLButtonElement} */ (byId(id));
/** @param {string} id */
export const input = (id) => /** @type {HTMLInputElement} */ (byId(id));
/** @param {string} id */
export const select = (id) => /** @type {HTMLSelectElement} */ (byId(id));
/** @param {string} id */
export const image = (id) => /** @type {HTMLImageElement} */ (byId(id));
/** @param {string} id */
export const dialog = (id) => /** @type {HTMLDialogElement} */ (byId(id));

/**
 * A new element: properties, `on…` listeners, `aria-…`/`data-…` attributes, then children.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (/^(aria|data)-|^(role|scope|for)$/.test(name)) element.setAttribute(name, value);
    else /** @type {any} */ (element)[name] = value;
  }
  element.append(...children);
  return element;
}

/**
 * One of the icons that index.html draws; for the eye only.
 * @param {string} name
 */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** Draw the icons of the elements that name one; those without words get a name. */
export function drawIcons() {
  for (const element of /** @type {NodeListOf<HTMLElement>} */ (
    document.querySelectorAll("[data-icon]")
  )) {
    element.prepend(icon(element.dataset.icon ?? ""));
    if (element.dataset.name) nameIcon(element, element.dataset.name);
  }
}

/**
 * Say what an icon without words does.
 * @param {HTMLElement} element
 * @param {string} name
 */
export function nameIcon(element, name) {
  element.classList.add("square");
  element.setAttribute("aria-label", name);
  element.title = name;
}

/**
 * A button without words: an icon with a name.
 * @param {string} name of the icon
 * @param {string} label
 * @param {() => void} onclick
 */
export function iconButton(name, label, onclick) {
  const element = make("button", { type: "button", className: "plain", onclick }, icon(name));
  nameIcon(element, label);
  return element;
}

/**
 * A select's options anew; the choice stays where it is still there.
 * @param {HTMLSelectElement} box
 * @param {{value: string, label?: string, disabled?: boolean}[]} options
 */
export function setOptions(box, options) {
  const before = box.value;
  box.replaceChildren(
    ...options.map(({ value, label, disabled }) =>
      make("option", { value, disabled: Boolean(disabled) }, label ?? value),
    ),
  );
  box.value = options.some((option) => option.value === before)
    ? before
    : (options[0]?.value ?? "");
}

/**
 * @param {HTMLElement} element
 * @param {boolean} is
 */
export function setPressed(element, is) {
  element.setAttribute("aria-pressed", String(is));
}

/** @param {HTMLElement} element */
export function isPressed(element) {
  return element.getAttribute("aria-pressed") === "true";
}

/**
 * What this browser keeps for the page; null where nothing is kept or nothing can be.
 * @param {string} name
 * @returns {any}
 */
export function kept(name) {
  try {
    return JSON.parse(localStorage.getItem(`maple.${name}`) ?? "null");
  } catch {
    return null;
  }
}

/**
 * @param {string} name
 * @param {unknown} value
 */
export function keep(name, value) {
  try {
    localStorage.setItem(`maple.${name}`, JSON.stringify(value));
  } catch {
    // no storage: it lasts as long as the page
  }
}

/**
 * A file as a data: URL, which the server takes for a picture.
 * @param {Blob} file
 * @returns {Promise<string>}
 */
export function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(file);
  });
}

/**
 * Hand a file to the reader.
 * @param {Blob} blob
 * @param {string} name
 */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
