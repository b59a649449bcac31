// Pictures to send: a file of the reader's, one of the history, or one that a drawing started from.

import { dataUrl } from "./dom.js";

/**
 * What the server takes for a picture, and where the page shows it from.
 * @typedef {{sent: string, url: string, name: string}} Source
 */

/**
 * @param {File} file
 * @returns {Promise<Source>}
 */
export async function sourceOfFile(file) {
  const url = await dataUrl(file);
  return { sent: url, url, name: file.name || "a pasted picture" };
}

/**
 * From what a drawing says: "picture:ID", "input:JOB-NAME", or a data: URL.
 * @param {string} sent
 * @returns {Source}
 */
export function sourceOf(sent) {
  const [, kind, id] = /^(picture|input):(.+)$/s.exec(sent) ?? [];
  if (kind === "picture") {
    return { sent, url: `/api/v1/pictures/${id}/file`, name: "a picture of the history" };
  }
  if (kind === "input") {
    const [job, name] = [id.slice(0, 24), id.slice(25)];
    return { sent, url: `/api/v1/jobs/${job}/inputs/${name}`, name: "the same picture" };
  }
  return { sent, url: sent, name: "a picture" };
}
