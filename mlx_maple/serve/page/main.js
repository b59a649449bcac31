// The page's parts, put together.

import * as api from "./api.js";
import { byId, drawIcons, icon, input, make, nameIcon } from "./dom.js";
import { setUpDrop } from "./drop.js";
import { askForPlan, setUpForm } from "./form.js";
import { addPictures, setUpGallery } from "./gallery.js";
import { setUpGuides } from "./guides.js";
import { cancelShown, setUpJobs, showPictures } from "./jobs.js";
import { setUpLists } from "./lists.js";
import { setUpLoras } from "./loras.js";
import { setUpMask } from "./mask.js";
import { setUpPresets } from "./presets.js";
import { useFile } from "./restore.js";
import { buildRows } from "./rows.js";
import { complain } from "./say.js";
import { enter } from "./session.js";
import { setUpSheet } from "./sheet.js";
import { setUpStart } from "./start.js";
import { drawForm } from "./submit.js";
import { inpaint, openViewer, setUpViewer, startFrom, vary } from "./viewer.js";

drawIcons();
const IDEAS = [
  "a red maple leaf on a yellow background",
  "a rocket on a dark blue background",
  "a green frog on a light blue background",
];

setUpTheme();
await enter();
buildRows();
setUpKeys();
setUpMask();
setUpLoras();
setUpGuides();
setUpStart(askForPlan);
setUpLists();
setUpDrop(useFile);
setUpViewer();
setUpSheet(openViewer);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  void drawForm();
});
for (const part of [setUpForm(), setUpPresets(), setUpGallery(openViewer)]) part.catch(complain);
setUpJobs({
  done: addPictures,
  open: openViewer,
  acts: [
    { icon: "vary", words: "Vary", act: vary },
    { icon: "image", words: "Image to image", act: startFrom },
    { icon: "brush", words: "Inpaint", act: inpaint },
  ],
  state: (text) => (text ? showState(text) : showDevice()),
});
showLatest().catch(complain);
// Not on a phone, where it would bring up the keyboard before anything was read.
if (matchMedia("(pointer: fine)").matches) byId("prompt").focus();
document.documentElement.dataset.ready = "true";

/** The picture that was drawn last, so that the page does not begin empty. */
async function showLatest() {
  const { pictures } = await api.get("/pictures?limit=1");
  if (!byId("shown-open").hidden || !byId("progress").hidden) return;
  if (pictures.length) showPictures(pictures);
  else showIdeas();
}

/** For who has drawn nothing yet. */
function showIdeas() {
  const take = (/** @type {string} */ idea) => {
    input("prompt").value = idea;
    byId("draw").focus();
  };
  byId("ideas").replaceChildren(
    ...IDEAS.map((idea) => make("button", { type: "button", onclick: () => take(idea) }, idea)),
  );
  byId("ideas").hidden = false;
}

/** @param {string} text */
function showState(text) {
  byId("state").textContent = text;
}

function showDevice() {
  api.get("/system").then(
    ({ version, device, backend }) =>
      showState([device ?? backend, version].filter(Boolean).join(" · ")),
    () => {},
  );
}

function setUpKeys() {
  const isMac = /Mac|iP(hone|ad)/.test(navigator.platform);
  if (isMac)
    for (const key of document.querySelectorAll("#keys kbd"))
      if (key.textContent === "Ctrl") key.textContent = "⌘";
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return; // Escape closes it, Enter is its own
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      void drawForm();
    } else if (event.key === "Escape" && cancelShown()) event.preventDefault();
  });
}

function setUpTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    const words = `Switch to the ${isDark() ? "light" : "dark"} appearance`;
    byId("theme").replaceChildren(icon(isDark() ? "sun" : "moon"));
    nameIcon(byId("theme"), words);
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("maple.theme", root.dataset.theme);
    } catch {
      // no storage: it lasts as long as the page
    }
    show();
  });
  system.addEventListener("change", show);
  show();
}
