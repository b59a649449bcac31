// Pictures that are dropped on the page or pasted into it: their settings, or the picture itself.

import * as api from "./api.js";
import { byId, dataUrl } from "./dom.js";
import { fill } from "./form.js";
import { complain, toast } from "./say.js";
import { setStart } from "./start.js";

export function setUpDrop() {
  let inside = 0; // dragenter and dragleave come for every element on the way
  const show = (/** @type {number} */ change) => {
    inside = Math.max(0, inside + change);
    byId("drop").hidden = inside === 0;
  };
  addEventListener("dragenter", (event) => hasFiles(event) && show(1));
  addEventListener("dragleave", (event) => hasFiles(event) && show(-1));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(-inside);
    take(event.dataTransfer?.files).catch(complain);
  });
  addEventListener("paste", (event) => {
    if (!event.clipboardData?.files.length) return;
    event.preventDefault();
    take(event.clipboardData.files).catch(complain);
  });
}

/** @param {DragEvent} event */
function hasFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}

/** @param {FileList | undefined} files */
async function take(files) {
  const file = [...(files ?? [])].find((one) => one.type.startsWith("image/"));
  if (!file) throw new Error("that is no picture");
  const url = await dataUrl(file);
  const source = { sent: url, url, name: file.name || "a pasted picture" };
  const begin = () => setStart(source);
  let info;
  try {
    info = await api.post("/png-info", { image: url });
  } catch (error) {
    if (!(error instanceof api.ApiError) || error.code !== "no_settings") throw error;
    begin();
    return toast("No settings are written in this picture: it is the one to start from.");
  }
  const left = [...fill({ ...info.draw, count: undefined }), ...info.notes];
  toast(
    left.length
      ? `Settings restored, but: ${left.join("; ")}`
      : "Settings restored from the picture.",
    {
      "Start from it": begin,
    },
  );
}
