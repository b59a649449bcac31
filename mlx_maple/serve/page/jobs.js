// Jobs as they go: the picture that forms, its progress, and the queue.

import * as api from "./api.js";
import { button, byId, icon, image, make } from "./dom.js";
import { isLive, Ledger } from "./ledger.js";
import { announce, complain, toast } from "./say.js";
import { dropWaiting, whenQueued, whenWaiting } from "./submit.js";
import { elapsed, progressWords } from "./words.js";

/** @typedef {import("./types.js").Job} Job */
/** @typedef {import("./types.js").Picture} Picture */

const ledger = new Ledger();
let onStage = ""; // the job that is shown
/** @type {Picture[]} */
let shownPictures = [];
let shownIndex = 0;
let notQueued = 0;
let saidQuarter = -1;

/** @type {{done: (pictures: Picture[]) => void, open: (picture: Picture, all: Picture[]) => void,
 *   acts: {icon: string, words: string, act: (picture: Picture) => Promise<void>}[],
 *   state: (text: string) => void}} */
let tell = { done: () => {}, open: () => {}, acts: [], state: () => {} };

/** @param {typeof tell} listeners */
export function setUpJobs(listeners) {
  tell = listeners;
  byId("cancel").addEventListener("click", () => cancelShown());
  byId("cancel-all").addEventListener("click", cancelAll);
  byId("shown-open").addEventListener("click", () => {
    if (shownPictures.length) tell.open(shownPictures[shownIndex], shownPictures);
  });
  byId("shown-actions").prepend(
    ...tell.acts.map(({ icon: name, words, act }) =>
      make(
        "button",
        { type: "button", onclick: () => act(shownPictures[shownIndex]).catch(complain) },
        icon(name),
        words,
      ),
    ),
  );
  whenWaiting((count) => {
    notQueued = count;
    showQueue();
  });
  // Its event is newer where it came first; where the events are lost for a while it is known all the same.
  whenQueued((job) => ledger.get(job.id) ?? hear(job));
  api.listen({ job: hear, preview: hearPreview, connected, lost });
}

async function connected() {
  tell.state("");
  try {
    const list = await api.get("/jobs");
    for (const job of list.jobs) {
      // What ended before the page was opened is history, unless it was followed from here.
      if (!isLive(job) && !ledger.get(job.id)) ledger.tell(job.id);
      hear(job);
    }
    const listed = new Set(list.jobs.map((/** @type {Job} */ job) => job.id));
    for (const job of ledger.live().filter(({ id }) => !listed.has(id))) {
      // It has ended long since, or the server knows it no more.
      api.get(`/jobs/${job.id}`).then(hear, (error) => {
        if (error.status === 404) hear({ ...job, state: "cancelled", progress: null });
      });
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
  const before = ledger.put(job);
  if (isLive(job) && ledger.get(job.id) !== job) return; // it has ended already
  if (isMine(job) && job.state === "running" && onStage !== job.id) takeStage(job);
  if (!isLive(job)) ended(job);
  if (job.id === onStage) showStage(job);
  ledger.forget(onStage);
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
  if (preview.job !== onStage || ledger.get(onStage)?.state !== "running") return;
  const shown = image("shown");
  shown.src = preview.image;
  shown.dataset.step = String(preview.step);
  byId("shown-open").hidden = false;
  byId("welcome").hidden = true;
}

/**
 * Be told of a job's end.
 * @param {string} id
 * @param {(job: Job) => void} act
 */
export const whenEnded = (id, act) => ledger.whenEnded(id, act);

/** @param {Job} job */
function ended(job) {
  if (!ledger.tell(job.id)) return;
  if (job.pictures.length) tell.done(job.pictures);
  if (!isMine(job)) return;
  for (const note of job.notes) toast(note);
  if (job.state === "done") {
    const seeds = job.pictures.map((picture) => picture.seed_text ?? "").join(", ");
    announce(
      `Done: ${job.pictures.length === 1 ? "one picture" : `${job.pictures.length} pictures`}, seed ${seeds}`,
    );
    if (!onStage || onStage === job.id || !isLive(ledger.get(onStage))) {
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
  byId("shown-actions").hidden = true;
  byId("shown-open").hidden = true;
  showWelcome("It begins…");
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
  byId("telling").classList.toggle("problem", job.state === "failed");
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
    showWelcome("No picture this time.");
  } else if (job.state === "cancelled") {
    byId("telling").textContent = "Cancelled.";
    showWelcome("The drawing was cancelled.");
  } else if (job.state === "done") {
    byId("telling").textContent = elapsed(job);
  } else {
    byId("telling").textContent = "It waits in the queue."; // again: the server was started anew
  }
  if (!byId("shown-open").hidden) byId("welcome").hidden = true;
}

/**
 * In a picture's place; one that is there stays to be looked at.
 * @param {string} words
 */
function showWelcome(words) {
  byId("welcome-words").textContent = words;
  byId("ideas").hidden = true;
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

/**
 * Take a picture that was deleted off the easel.
 * @param {string} id
 */
export function dropPicture(id) {
  const left = shownPictures.filter((picture) => picture.id !== id);
  if (left.length === shownPictures.length) return;
  showPictures(left);
  if (left.length) return;
  byId("shown-open").hidden = true;
  byId("shown-actions").hidden = true;
  byId("telling").textContent = "";
  showWelcome("The picture is deleted.");
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
  byId("shown-actions").hidden = false;
  const link = /** @type {HTMLAnchorElement} */ (byId("shown-download"));
  link.href = `${picture.url}?download=true`;
  link.download = `${picture.id}.png`;
}

/** Cancel the job on the easel. @returns {boolean} whether there was one to cancel */
export function cancelShown() {
  const job = ledger.get(onStage);
  if (!job || !isLive(job)) return false;
  cancel(job);
  return true;
}

/** @param {Job} job */
function cancel(job) {
  api.post(`/jobs/${job.id}/cancel`).then(hear, complain);
}

function cancelAll() {
  dropWaiting();
  for (const job of ledger.live()) if (isMine(job)) cancel(job);
}

function showQueue() {
  const live = ledger.live().filter((job) => job.id !== runningHere());
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
  return ledger.get(onStage)?.state === "running" ? onStage : "";
}
