// Settings back into the form: of a picture of the history, or of a file.

import * as api from "./api.js";
import { drawingOf } from "./again.js";
import { byId } from "./dom.js";
import { fill, fillPictures } from "./form.js";
import { literals } from "./prompts.js";
import { toast } from "./say.js";
import { sourceOfFile } from "./sources.js";
import { setStart } from "./start.js";

/** @typedef {import("./types.js").Picture} Picture */

const LOST = "the picture that it started from is kept no more";

/** What a picture was drawn with, its own pictures too. @param {Picture} picture */
export async function useSettings(picture) {
  const { draw, lost } = await drawingOf(picture);
  const filled = { ...draw, ...literals(draw), count: undefined };
  const left = [...fill(filled), ...(lost ? [LOST] : [])];
  fillPictures(draw);
  toast(
    left.length
      ? `The settings are in the form, but ${left.join(", ")}.`
      : "The settings are in the form.",
  );
  byId("prompt").focus();
}

/**
 * What is written in a file; a picture that says nothing is the one to start from.
 * @param {File} file
 */
export async function useFile(file) {
  const source = await sourceOfFile(file);
  const begin = () => setStart(source);
  let info;
  try {
    info = await api.post("/png-info", { image: source.url });
  } catch (error) {
    if (!(error instanceof api.ApiError) || error.code !== "no_settings") throw error;
    begin();
    return toast(
      "No settings that can be read are in this picture: it is the one to start from.",
    );
  }
  const filled = { ...info.draw, ...literals(info.draw), count: undefined };
  const left = [...fill(filled), ...info.notes];
  if (info.draw.strength === undefined) fillPictures(info.draw); // it was drawn from nothing
  toast(
    left.length
      ? `Settings restored, but: ${left.join("; ")}`
      : "Settings restored from the picture.",
    { "Start from it": begin },
  );
}
