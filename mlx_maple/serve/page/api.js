// The server's /api/v1, as it is: requests, errors and events.

import { keep, kept } from "./dom.js";

/** An error that the server answered with, or that it did not answer. */
export class ApiError extends Error {
  /**
   * @param {number} status 0 where nothing answered
   * @param {{code?: string, message?: string, details?: {field: string, message: string}[]}} said
   * @param {number} retryAfter seconds
   */
  constructor(status, said, retryAfter = 0) {
    super(said.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = said.code ?? "failed";
    this.details = said.details ?? [];
    this.retryAfter = retryAfter;
  }
}

/** This browser, so that the queue is fair between people and the page knows its own jobs. */
export const clientId = (() => {
  let id = kept("client");
  if (typeof id !== "string" || !/^[A-Za-z0-9_-]{1,64}$/.test(id)) {
    id = [...crypto.getRandomValues(new Uint8Array(12))]
      .map((b) => b.toString(16).padStart(2, "0"))
      .join("");
    keep("client", id);
  }
  return id;
})();

/** @type {() => void} */
let onUnauthorized = () => {};

/** @param {() => void} act what to do where the token is missing */
export function whenUnauthorized(act) {
  onUnauthorized = act;
}

/**
 * @param {string} method
 * @param {string} path below /api/v1
 * @param {unknown} [body]
 * @returns {Promise<Response>}
 * @throws {ApiError}
 */
async function request(method, path, body) {
  /** @type {Record<string, string>} */
  const headers = { "X-Maple-Client": clientId };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(`/api/v1${path}`, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw new ApiError(0, {
      code: "gone",
      message: "the server does not answer: is it still running?",
    });
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  if (response.status === 401 && path !== "/session") onUnauthorized();
  throw new ApiError(
    response.status,
    said.error ?? {},
    Number(response.headers.get("Retry-After")) || 0,
  );
}

/** @param {string} path @returns {Promise<any>} */
export const get = async (path) => (await request("GET", path)).json();
/** @param {string} path @param {unknown} [body] @returns {Promise<any>} */
export const post = async (path, body) => (await request("POST", path, body)).json();
/** @param {string} path @param {unknown} body @returns {Promise<any>} */
export const put = async (path, body) => (await request("PUT", path, body)).json();
/** @param {string} path */
export const remove = async (path) => void (await request("DELETE", path));
/** @param {string} path @param {unknown} body @returns {Promise<Blob>} */
export const postForFile = async (path, body) => (await request("POST", path, body)).blob();

/**
 * What the server takes, as its OpenAPI document has it: a drawing has other fields in other versions.
 * @returns {Promise<Record<string, any>>}
 */
export async function schemas() {
  try {
    return (await (await fetch("/openapi.json")).json()).components.schemas;
  } catch {
    return {};
  }
}

/**
 * Hear of every job; the browser connects again by itself.
 * @param {{job: (job: import("./types.js").Job) => void,
 *   preview: (preview: {job: string, step: number, image: string}) => void,
 *   connected: () => void, lost: () => void}} hear
 */
export function listen(hear) {
  const source = new EventSource("/api/v1/events");
  source.addEventListener("job", (event) => hear.job(JSON.parse(event.data)));
  source.addEventListener("preview", (event) => hear.preview(JSON.parse(event.data)));
  source.addEventListener("open", () => hear.connected());
  source.addEventListener("error", () => {
    hear.lost();
    // A server that was away long makes some browsers give up.
    if (source.readyState !== EventSource.CLOSED) return;
    setTimeout(() => listen(hear), 3000);
    // Nor do they say why: it may ask for another token now.
    get("/session").then(
      ({ token_needed, signed_in }) => token_needed && !signed_in && onUnauthorized(),
      () => {},
    );
  });
}

/** @param {number} seconds */
export const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));
