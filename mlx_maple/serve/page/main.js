// The page's parts, put together.

import * as api from "./api.js";
import { byId } from "./dom.js";
import { setUpDrop } from "./drop.js";
import { askForPlan, setUpForm } from "./form.js";
import { addPictures, setUpGallery } from "./gallery.js";
import { cancelShown, setUpJobs, showPictures } from "./jobs.js";
import { setUpLists } from "./lists.js";
import { setUpMask } from "./mask.js";
import { setUpPresets } from "./presets.js";
import { ask, complain } from "./say.js";
import { setUpSheet } from "./sheet.js";
import { setUpStart } from "./start.js";
import { drawForm } from "./submit.js";
import { openViewer, setUpViewer } from "./viewer.js";

setUpTheme();
setUpKeys();
setUpMask();
setUpStart(askForPlan);
setUpLists();
setUpDrop();
setUpViewer();
setUpSheet(openViewer);
api.whenUnauthorized(askForToken);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  void drawForm();
});
for (const part of [setUpForm(), setUpPresets(), setUpGallery(openViewer)]) part.catch(complain);
setUpJobs({
  done: addPictures,
  open: openViewer,
  state: (text) => (text ? showState(text) : showDevice()),
});
showLatest().catch(complain);
// Not on a phone, where it would bring up the keyboard before anything was read.
if (matchMedia("(pointer: fine)").matches) byId("prompt").focus();
document.documentElement.dataset.ready = "true";

/** The picture that was drawn last, so that the page does not begin empty. */
async function showLatest() {
  const { pictures } = await api.get("/pictures?limit=1");
  if (pictures.length && byId("shown-open").hidden && byId("progress").hidden)
    showPictures(pictures);
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
    byId("theme").textContent = isDark() ? "Light" : "Dark";
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

let asking = false;

async function askForToken() {
  if (asking) return;
  asking = true;
  const token = await ask("The server's token", { secret: true });
  asking = false;
  if (token) location.assign(`/?token=${encodeURIComponent(token)}`);
}
