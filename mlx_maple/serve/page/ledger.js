// The jobs that the page has heard of, and which ends it has told. Nothing here knows the page.

/** @typedef {import("./types.js").Job} Job */

const LIVE = ["queued", "running", "offered"];

/** @param {Job | undefined} job */
export const isLive = (job) => job !== undefined && LIVE.includes(job.state);

/** A page may stay open for weeks: the oldest jobs that have ended are let go. */
export class Ledger {
  /** @param {number} [most] ended jobs that are remembered */
  constructor(most = 200) {
    this._most = most;
    /** In the order in which they were heard of. @type {Map<string, Job>} */
    this._jobs = new Map();
    /** Ended jobs whose end was told. @type {Set<string>} */
    this._told = new Set();
    /** What waits for the end of a job. @type {Map<string, ((job: Job) => void)[]>} */
    this._waiters = new Map();
  }

  get size() {
    return this._jobs.size;
  }

  /** @param {string} id */
  get(id) {
    return this._jobs.get(id);
  }

  live() {
    return [...this._jobs.values()].filter(isLive);
  }

  /**
   * Take a job as it is now. An end is final: what comes after it, such as the answer to a cancel
   * that an event has overtaken, is older.
   * @param {Job} job
   * @returns {Job | undefined} as it was before
   */
  put(job) {
    const before = this._jobs.get(job.id);
    if (before && !isLive(before) && isLive(job)) return before;
    this._jobs.set(job.id, job);
    if (!isLive(job)) {
      for (const act of this._waiters.get(job.id) ?? []) act(job);
      this._waiters.delete(job.id);
    }
    return before;
  }

  /**
   * Act when a job ends, or now where it has.
   * @param {string} id
   * @param {(job: Job) => void} act
   */
  whenEnded(id, act) {
    const job = this._jobs.get(id);
    if (job && !isLive(job)) act(job);
    else this._waiters.set(id, [...(this._waiters.get(id) ?? []), act]);
  }

  /**
   * Whether a job's end is still to be told; it is so once.
   * @param {string} id
   */
  tell(id) {
    if (this._told.has(id)) return false;
    this._told.add(id);
    return true;
  }

  /**
   * Let the oldest ended jobs go.
   * @param {string} [except] the one that is shown
   */
  forget(except = "") {
    let over = this._jobs.size - this.live().length - this._most;
    for (const [id, job] of this._jobs) {
      if (over <= 0) return;
      if (isLive(job) || id === except) continue;
      this._jobs.delete(id);
      this._told.delete(id);
      over--;
    }
  }
}
