// From the form to jobs: choices in prompts, grids, and patience with a full queue.

import * as api from "./api.js";
import { byId, input, kept } from "./dom.js";
import { pointAt, read, takeSeed } from "./form.js";
import { guideFields } from "./guides.js";
import { expand, expandAll, isDynamic, linesIn } from "./prompts.js";
import { announce, FormError, showProblem } from "./say.js";
import { seedAfter, seededRandom } from "./seeds.js";
import { startFields } from "./start.js";

/** @typedef {import("./types.js").Draw} Draw */
/** @typedef {import("./types.js").Job} Job */

export const MOST_JOBS = 32; // of one press of the button, for choices in prompts

let round = 0; // goes up when everything is cancelled
let waiting = 0;
/** @type {(count: number) => void} */
let onWaiting = () => {};

/** @param {(count: number) => void} hear how many jobs the server had no room for yet */
export function whenWaiting(hear) {
  onWaiting = hear;
}

/** @type {(job: Job) => void} */
let onQueued = () => {};

/** @param {(job: Job) => void} hear each job that the server has taken */
export function whenQueued(hear) {
  onQueued = hear;
}

/** Let go of the jobs that are not in the server's queue yet. */
export function dropWaiting() {
  round++;
}

/** The user's word lists. @returns {import("./prompts.js").Lists} */
export function wordLists() {
  const texts = /** @type {Record<string, string>} */ (kept("lists") ?? {});
  return Object.fromEntries(Object.entries(texts).map(([name, text]) => [name, linesIn(text)]));
}

/**
 * The form as a drawing, with its seed and pictures.
 * @returns {Draw}
 */
export function drawing() {
  return { ...read(), ...startFields(), ...guideFields(), seed: takeSeed() };
}

/**
 * The drawings that one becomes: one, or one for each picture where the prompt has choices.
 * @param {Draw} draw
 * @param {{everything?: boolean}} [how] every combination of the choices
 * @returns {Draw[]}
 */
export function expanded(draw, { everything = false } = {}) {
  const negative = draw.negative_prompt ?? "";
  const lists = wordLists();
  if (!isDynamic(draw.prompt) && !isDynamic(negative)) {
    const plain = (/** @type {string} */ text) => expand(text, lists, () => 0); // without backslashes
    return [
      {
        ...draw,
        prompt: plain(draw.prompt),
        ...(negative && { negative_prompt: plain(negative) }),
      },
    ];
  }
  const prompts = everything ? expandAll(draw.prompt, lists, MOST_JOBS) : null;
  const count = prompts ? prompts.length : (draw.count ?? 1);
  return Array.from({ length: count }, (_, i) => {
    const seed = seedAfter(String(draw.seed), i);
    const random = seededRandom(seed);
    /** @type {Draw} */
    const one = {
      ...draw,
      seed,
      count: 1,
      prompt: prompts ? prompts[i] : expand(draw.prompt, lists, random),
    };
    if (negative) one.negative_prompt = expand(negative, lists, random);
    return one;
  });
}

/** Draw what the form says. @returns {Promise<Job[]>} */
export async function drawForm() {
  return guarded(async () => {
    const everything = input("all-combinations").checked;
    const jobs = await submit(expanded(drawing(), { everything }));
    showEasel();
    return jobs;
  });
}

/** Where it lies below the form it may be out of sight. */
function showEasel() {
  const easel = byId("easel");
  if (easel.getBoundingClientRect().top > innerHeight * 0.6)
    easel.scrollIntoView({ block: "center" });
}

/**
 * Say what is wrong at the form instead of failing.
 * @template T
 * @param {() => Promise<T>} act
 * @returns {Promise<T | []>}
 */
export async function guarded(act) {
  showProblem("");
  try {
    return await act();
  } catch (error) {
    if (error instanceof FormError) pointAt(error.field);
    else if (error instanceof api.ApiError && error.details.length) pointAt(error.details[0].field);
    showProblem(error instanceof Error ? error.message : String(error));
    return [];
  }
}

/**
 * Queue drawings one after another; a full queue is waited for.
 * @param {Draw[]} draws
 * @param {(job: Job, place: number) => void} [onJob]
 * @returns {Promise<Job[]>} those that were queued
 */
export async function submit(draws, onJob = () => {}) {
  const mine = round;
  const jobs = [];
  tellWaiting(draws.length);
  try {
    for (const [place, draw] of draws.entries()) {
      const job = await patiently(draw, () => mine === round);
      if (!job) break;
      tellWaiting(-1);
      onQueued(job);
      jobs.push(job);
      onJob(job, place);
    }
  } finally {
    tellWaiting(jobs.length - draws.length);
  }
  announce(jobs.length === 1 ? "Queued" : `${jobs.length} drawings queued`);
  return jobs;
}

/** @param {number} change */
function tellWaiting(change) {
  waiting += change;
  onWaiting(waiting);
}

/**
 * @param {Draw} draw
 * @param {() => boolean} wanted
 * @returns {Promise<Job | null>} null where it is wanted no more
 */
async function patiently(draw, wanted) {
  while (wanted()) {
    try {
      return await api.post("/jobs", draw);
    } catch (error) {
      if (!(error instanceof api.ApiError) || error.status !== 429) throw error;
      await api.sleep(Math.min(5, Math.max(1, error.retryAfter)));
    }
  }
  return null;
}
