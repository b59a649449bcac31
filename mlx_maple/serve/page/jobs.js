// Jobs as they go: the picture that forms, its progress, and the queue.

import * as api from "./api.js";
import { button, byId, image, make } from "./dom.js";
import { announce, complain, toast } from "./say.js";
import { dropWaiting, whenWaiting } from "./submit.js";
import { elapsed, progressWords } from "./words.js";

/** @typedef {import("./types.js").Job} Job */
/** @typedef {import("./types.js").Picture} Picture */

const LIVE = ["queued", "running", "offered"];

/** @type {Map<string, Job>} */
const jobs = new Map();
/** What waits for the end of a job. @type {Map<string, ((job: Job) => void)[]>} */
const waiters = new Map();
/** Ended jobs whose end was told. @type {Set<string>} */
const told = new Set();
let onStage = ""; // the job that is shown
/** @type {Picture[]} */
let shownPictures = [];
let shownIndex = 0;
let notQueued = 0;
let saidQuarter = -1;

/** @type {{done: (pictures: Picture[]) => void, open: (picture: Picture, all: Picture[]) => void,
 *   state: (text: string) => void}} */
let tell = { done: () => {}, open: () => {}, state: () => {} };

/** @param {typeof tell} listeners */
export function setUpJobs(listeners) {
  tell = listeners;
  byId("cancel").addEventListener("click", () => cancelShown());
  byId("cancel-all").addEventListener("click", cancelAll);
  byId("shown-open").addEventListener("click", () => {
    if (shownPictures.length) tell.open(shownPictures[shownIndex], shownPictures);
  });
  whenWaiting((count) => {
    notQueued = count;
    showQueue();
  });
  api.listen({ job: hear, preview: hearPreview, connected, lost });
}

async function connected() {
  tell.state("");
  try {
    const list = await api.get("/jobs");
    for (const job of list.jobs) {
      // What ended before the page was opened is history, unless it was followed from here.
      if (!LIVE.includes(job.state) && !jobs.has(job.id)) told.add(job.id);
      hear(job);
    }
  } catch (error) {
    complain(error);
  }
}

function lost() {
  tell.state("No connection to the server; trying again…");
}

/** @param {Job} job */
const isMine = (job) => job.client === api.clientId;

/** @param {Job} job */
function hear(job) {
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  if (isMine(job) && job.state === "running" && onStage !== job.id) takeStage(job);
  if (!LIVE.includes(job.state)) ended(job);
  if (job.id === onStage) showStage(job);
  if (
    !before ||
    before.state !== job.state ||
    before.position !== job.position ||
    before.cancelling !== job.cancelling
  ) {
    showQueue();
  }
}

/** @param {{job: string, step: number, image: string}} preview */
function hearPreview(preview) {
  if (preview.job !== onStage || jobs.get(onStage)?.state !== "running") return;
  const shown = image("shown");
  shown.src = preview.image;
  shown.dataset.step = String(preview.step);
  byId("shown-open").hidden = false;
}

/**
 * Be told of a job's end.
 * @param {string} id
 * @param {(job: Job) => void} act
 */
export function whenEnded(id, act) {
  const job = jobs.get(id);
  if (job && !LIVE.includes(job.state)) act(job);
  else waiters.set(id, [...(waiters.get(id) ?? []), act]);
}

/** @param {Job} job */
function ended(job) {
  for (const act of waiters.get(job.id) ?? []) act(job);
  waiters.delete(job.id);
  if (told.has(job.id)) return;
  told.add(job.id);
  if (job.pictures.length) tell.done(job.pictures);
  if (!isMine(job)) return;
  for (const note of job.notes) toast(note);
  if (job.state === "done") {
    const seeds = job.pictures.map((picture) => picture.seed_text ?? "").join(", ");
    announce(
      `Done: ${job.pictures.length === 1 ? "one picture" : `${job.pictures.length} pictures`}, seed ${seeds}`,
    );
    if (!onStage || onStage === job.id || !LIVE.includes(jobs.get(onStage)?.state ?? "done")) {
      onStage = job.id;
      showPictures(job.pictures, job);
    }
  } else announce(job.state === "failed" ? `Failed: ${job.error?.message ?? ""}` : "Cancelled");
}

/**
 * A job that begins to be drawn takes the easel.
 * @param {Job} job
 */
function takeStage(job) {
  onStage = job.id;
  saidQuarter = -1;
  shownPictures = [];
  byId("batch").replaceChildren();
  byId("welcome").hidden = false;
  byId("welcome").textContent = "It begins…";
  byId("shown-open").hidden = true;
  button("shown-open").disabled = true;
  const shown = image("shown");
  shown.alt = "The picture as it is so far";
  delete shown.dataset.step;
}

/** @param {Job} job */
function showStage(job) {
  const bar = /** @type {HTMLProgressElement} */ (byId("progress"));
  const running = job.state === "running";
  bar.hidden = !running;
  button("cancel").hidden = !running;
  button("cancel").disabled = job.cancelling;
  document.title = "Maple";
  if (running) {
    const progress = job.progress;
    if (progress) bar.value = progress.fraction;
    else bar.removeAttribute("value");
    byId("telling").textContent = job.cancelling ? "Cancelling…" : progressWords(progress);
    if (progress?.stage === "sample") {
      document.title = `${progress.step}/${progress.total} Maple`;
      const quarter = Math.floor((4 * progress.step) / progress.total);
      if (quarter !== saidQuarter) announce(progressWords(progress));
      saidQuarter = quarter;
    }
  } else if (job.state === "failed") {
    byId("telling").textContent = `It failed: ${job.error?.message ?? "no reason given"}`;
    emptyEasel("No picture this time.");
  } else if (job.state === "cancelled") {
    byId("telling").textContent = "Cancelled.";
    emptyEasel("The drawing was cancelled.");
  } else if (job.state === "done") {
    byId("telling").textContent = elapsed(job);
  }
  if (!byId("shown-open").hidden) byId("welcome").hidden = true;
}

/**
 * Without a picture to show; a preview that was there stays to be looked at.
 * @param {string} text
 */
function emptyEasel(text) {
  byId("welcome").textContent = text;
  byId("welcome").hidden = !byId("shown-open").hidden;
}

/**
 * @param {Picture[]} pictures
 * @param {Job} [job]
 */
export function showPictures(pictures, job) {
  shownPictures = pictures;
  showOne(0);
  byId("batch").replaceChildren(
    ...(pictures.length > 1 ? pictures : []).map((picture, i) =>
      make(
        "li",
        {},
        make(
          "button",
          {
            type: "button",
            "aria-label": `Picture ${i + 1}, seed ${picture.seed_text ?? ""}`,
            onclick: () => showOne(i),
          },
          make("img", { src: picture.thumbnail, alt: "" }),
        ),
      ),
    ),
  );
  if (job) byId("telling").textContent = elapsed(job);
}

/** @param {number} place */
function showOne(place) {
  const picture = shownPictures[place];
  if (!picture) return;
  shownIndex = place;
  const shown = image("shown");
  shown.src = picture.url;
  shown.alt = String(picture.settings.prompt ?? "A picture");
  delete shown.dataset.step;
  byId("shown-open").hidden = false;
  button("shown-open").disabled = false;
  byId("shown-open").title = "Settings and more";
  byId("welcome").hidden = true;
}

/** Cancel the job on the easel. @returns {boolean} whether there was one to cancel */
export function cancelShown() {
  const job = jobs.get(onStage);
  if (!job || !LIVE.includes(job.state)) return false;
  cancel(job);
  return true;
}

/** @param {Job} job */
function cancel(job) {
  api.post(`/jobs/${job.id}/cancel`).then(hear, complain);
}

function cancelAll() {
  dropWaiting();
  for (const job of jobs.values()) if (isMine(job) && LIVE.includes(job.state)) cancel(job);
}

function showQueue() {
  const live = [...jobs.values()].filter(
    (job) => LIVE.includes(job.state) && job.id !== runningHere(),
  );
  const order = { running: 0, queued: 1, offered: 2 };
  live.sort((a, b) => {
    const by = (/** @type {Job} */ job) =>
      order[/** @type {"running"} */ (job.state)] * 1e6 + (job.position ?? 0);
    return by(a) - by(b);
  });
  byId("queue-box").hidden = !live.length && !notQueued;
  const items = live.map((job) => {
    const words = {
      running: "being drawn",
      queued: job.position === 0 ? "next" : `${job.position} before it`,
      offered: "was waiting when the server ended",
    };
    const item = make(
      "li",
      {},
      make(
        "span",
        { className: "text" },
        String(job.draw.prompt ?? "").slice(0, 200) || "(no prompt)",
      ),
      make(
        "span",
        { className: "quiet" },
        words[/** @type {"running"} */ (job.state)] + (isMine(job) ? "" : ", of someone else"),
      ),
    );
    if (job.state === "offered") {
      const again = () => api.post(`/jobs/${job.id}/resume`).then(hear, complain);
      item.append(
        make(
          "button",
          { type: "button", "data-press": `again ${job.id}`, onclick: again },
          "Draw it",
        ),
      );
    }
    item.append(
      make(
        "button",
        {
          type: "button",
          "data-press": `end ${job.id}`,
          disabled: job.cancelling,
          onclick: () => cancel(job),
        },
        job.state === "offered" ? "Forget it" : "Cancel",
      ),
    );
    return item;
  });
  if (notQueued > 0)
    items.push(make("li", { className: "quiet" }, `${notQueued} more wait for room in the queue`));
  const focused = /** @type {HTMLElement | null} */ (document.activeElement)?.dataset?.press;
  byId("queue").replaceChildren(...items);
  if (focused)
    /** @type {HTMLElement | null} */ (
      document.querySelector(`[data-press="${CSS.escape(focused)}"]`)
    )?.focus();
}

function runningHere() {
  return jobs.get(onStage)?.state === "running" ? onStage : "";
}
