// Painting a mask: brush, eraser, undo, with pointer or keys. White is what is drawn again.

import { button, byId, dialog, image, input, isPressed, make, setPressed } from "./dom.js";

/**
 * @typedef {{kind: "stroke", erases: boolean, radius: number, points: [number, number][]}} Stroke
 * @typedef {Stroke | {kind: "invert"} | {kind: "clear"} | {kind: "given", canvas: HTMLCanvasElement}}
 *   Action
 */

/** @type {Action[]} */
let done = [];
/** @type {Action[]} */
let undone = [];
let paintedOver = ""; // the picture, and the mask it came with, that `done` belongs to
let painted = ""; // what was sent last
/** @type {Stroke | null} */
let stroke = null;
let cursor = { x: 0, y: 0 };

const canvas = () => /** @type {HTMLCanvasElement} */ (byId("mask-canvas"));

function context() {
  const found = canvas().getContext("2d", { willReadFrequently: true });
  if (!found) throw new Error("this browser cannot paint");
  return found;
}

/**
 * Show the painter over a picture.
 * @param {string} url of the picture
 * @param {string} [given] the mask that is there already
 * @returns {Promise<string | null>} a PNG as a data: URL, "" where nothing is painted, null where
 *   it was cancelled
 */
export async function paintMask(url, given) {
  const picture = image("mask-picture");
  picture.src = url;
  await picture.decode();
  // One that was painted here is the outcome of `done`, and can be undone.
  if (paintedOver !== url || (given && given !== painted)) {
    done = given ? [{ kind: "given", canvas: await readMask(given, picture) }] : [];
    undone = [];
    paintedOver = url;
  }
  const before = [...done];
  const box = dialog("masker");
  box.returnValue = "";
  box.showModal();
  canvas().width = picture.naturalWidth;
  canvas().height = picture.naturalHeight;
  cursor = { x: picture.naturalWidth / 2, y: picture.naturalHeight / 2 };
  fit();
  repaint();
  canvas().focus();
  return new Promise((resolve) => {
    box.addEventListener(
      "close",
      () => {
        if (box.returnValue !== "use") {
          done = before;
          return resolve(null);
        }
        painted = exported();
        resolve(painted);
      },
      { once: true },
    );
  });
}

/**
 * A mask as paint: seen where it is white.
 * @param {string} url
 * @param {HTMLImageElement} picture whose size it takes
 */
async function readMask(url, picture) {
  const white = make("img", { src: url });
  await white.decode();
  const found = make("canvas", { width: picture.naturalWidth, height: picture.naturalHeight });
  const brush = found.getContext("2d");
  if (!brush) throw new Error("this browser cannot paint");
  brush.drawImage(white, 0, 0, found.width, found.height);
  const pixels = brush.getImageData(0, 0, found.width, found.height);
  for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
  brush.putImageData(pixels, 0, 0);
  return found;
}

/** Connect the painter's buttons; once. */
export function setUpMask() {
  const area = canvas();
  area.addEventListener("pointerdown", (event) => {
    area.setPointerCapture(event.pointerId);
    begin(place(event));
  });
  area.addEventListener("pointermove", (event) => {
    cursor = place(event);
    // Every place that the pointer was at since the last event, where the browser tells.
    for (const one of event.getCoalescedEvents?.() ?? []) extend(place(one));
    extend(cursor);
    showBrush();
  });
  for (const kind of ["pointerup", "pointercancel"]) area.addEventListener(kind, end);
  area.addEventListener("keydown", onKey);
  byId("mask-paint").addEventListener("click", () => setErases(false));
  byId("mask-erase").addEventListener("click", () => setErases(true));
  byId("mask-undo").addEventListener("click", undo);
  byId("mask-redo").addEventListener("click", redo);
  byId("mask-invert").addEventListener("click", () => act({ kind: "invert" }));
  byId("mask-clear").addEventListener("click", () => act({ kind: "clear" }));
  byId("mask-use").addEventListener("click", () => dialog("masker").close("use"));
  byId("mask-cancel").addEventListener("click", () => dialog("masker").close(""));
  input("mask-size").addEventListener("input", showBrush);
  dialog("masker").addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
    event.preventDefault();
    (event.shiftKey ? redo : undo)();
  });
  addEventListener("resize", () => dialog("masker").open && fit());
}

/** As large as there is room for. */
function fit() {
  const { naturalWidth: width, naturalHeight: height } = image("mask-picture");
  const scale = Math.min((innerWidth * 0.86) / width, (innerHeight * 0.62) / height);
  byId("mask-area").style.width =
    `${Math.round(width * Math.min(scale, Math.max(1, 640 / width)))}px`;
  image("mask-picture").style.width = "100%";
  showBrush();
}

/** @param {PointerEvent} event */
function place(event) {
  const box = canvas().getBoundingClientRect();
  return {
    x: ((event.clientX - box.left) / box.width) * canvas().width,
    y: ((event.clientY - box.top) / box.height) * canvas().height,
  };
}

/** In pixels of the picture; the slider is in hundredths of half its longer side. */
function radius() {
  return (Number(input("mask-size").value) / 200) * Math.max(canvas().width, canvas().height) * 0.5;
}

/** @param {boolean} erases */
function setErases(erases) {
  setPressed(byId("mask-erase"), erases);
  setPressed(byId("mask-paint"), !erases);
}

/** @param {{x: number, y: number}} at */
function begin({ x, y }) {
  stroke = {
    kind: "stroke",
    erases: isPressed(byId("mask-erase")),
    radius: radius(),
    points: [[x, y]],
  };
  paint(stroke);
}

/** @param {{x: number, y: number}} to */
function extend({ x, y }) {
  if (!stroke) return;
  stroke.points.push([x, y]);
  paint({ ...stroke, points: stroke.points.slice(-2) });
}

function end() {
  if (!stroke) return;
  done.push(stroke);
  undone = [];
  stroke = null;
  showButtons();
}

/** @param {Action} action */
function act(action) {
  done.push(action);
  undone = [];
  repaint();
}

function undo() {
  const last = done.pop();
  if (last) undone.push(last);
  repaint();
}

function redo() {
  const next = undone.pop();
  if (next) done.push(next);
  repaint();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  const step = Math.max(1, radius() / 2);
  /** @type {Record<string, [number, number]>} */
  const moves = {
    ArrowLeft: [-step, 0],
    ArrowRight: [step, 0],
    ArrowUp: [0, -step],
    ArrowDown: [0, step],
  };
  const move = moves[event.key];
  if (move) {
    cursor.x = Math.min(canvas().width, Math.max(0, cursor.x + move[0]));
    cursor.y = Math.min(canvas().height, Math.max(0, cursor.y + move[1]));
    showBrush();
  } else if (event.key === " ") {
    begin(cursor);
    end();
  } else if (event.key === "z" && !event.ctrlKey && !event.metaKey) undo();
  else return;
  event.preventDefault();
}

/** All of it again, which is what undo needs. */
function repaint() {
  context().clearRect(0, 0, canvas().width, canvas().height);
  done.forEach(paint);
  showButtons();
}

/** @param {Action} action */
function paint(action) {
  const brush = context();
  const { width, height } = canvas();
  brush.fillStyle = brush.strokeStyle = hatching(Math.ceil(Math.max(width, height) / 48));
  if (action.kind === "given") {
    // Its shape, in the same paint.
    const layer = make("canvas", { width, height });
    const over = /** @type {CanvasRenderingContext2D} */ (layer.getContext("2d"));
    over.drawImage(action.canvas, 0, 0);
    over.globalCompositeOperation = "source-in";
    over.fillStyle = brush.fillStyle;
    over.fillRect(0, 0, width, height);
    brush.drawImage(layer, 0, 0);
  } else if (action.kind === "clear") {
    brush.clearRect(0, 0, width, height);
  } else if (action.kind === "invert") {
    brush.globalCompositeOperation = "xor";
    brush.fillRect(0, 0, width, height);
  } else {
    brush.globalCompositeOperation = action.erases ? "destination-out" : "source-over";
    brush.lineWidth = action.radius * 2;
    brush.lineCap = brush.lineJoin = "round";
    brush.beginPath();
    const [[x, y], ...others] = action.points;
    brush.moveTo(x, y);
    for (const [nextX, nextY] of others) brush.lineTo(nextX, nextY);
    brush.stroke();
    if (!others.length) {
      brush.arc(x, y, action.radius, 0, 2 * Math.PI); // a dot: a line of no length leaves nothing
      brush.fill();
    }
  }
  brush.globalCompositeOperation = "source-over";
}

/**
 * White lines on black, seen on pictures of any colour; only where it lies is sent.
 * @param {number} side of the tile that repeats, in pixels of the picture
 * @returns {CanvasPattern | string}
 */
function hatching(side) {
  const size = Math.max(4, side);
  const tile = make("canvas", { width: size, height: size });
  const brush = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, size, size);
  brush.strokeStyle = "#fff";
  brush.lineWidth = size / 3;
  for (const from of [-size, 0, size]) {
    brush.moveTo(from - 1, size + 1);
    brush.lineTo(from + size + 1, -1);
  }
  brush.stroke();
  return context().createPattern(tile, "repeat") ?? "#000";
}

function showButtons() {
  button("mask-undo").disabled = !done.length;
  button("mask-redo").disabled = !undone.length;
}

function showBrush() {
  const scale = canvas().getBoundingClientRect().width / canvas().width;
  const { style } = byId("mask-brush");
  style.width = style.height = `${radius() * 2 * scale}px`;
  style.left = `${cursor.x * scale}px`;
  style.top = `${cursor.y * scale}px`;
}

/** White where it is painted, black elsewhere; "" where nothing is. */
function exported() {
  const { width, height } = canvas();
  const pixels = context().getImageData(0, 0, width, height).data;
  if (!pixels.some((value, i) => i % 4 === 3 && value > 0)) return "";
  const out = document.createElement("canvas");
  out.width = width;
  out.height = height;
  const brush = out.getContext("2d");
  if (!brush) throw new Error("this browser cannot paint");
  brush.drawImage(canvas(), 0, 0);
  brush.globalCompositeOperation = "source-in";
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, width, height);
  brush.globalCompositeOperation = "destination-over";
  brush.fillStyle = "#000";
  brush.fillRect(0, 0, width, height);
  return out.toDataURL("image/png");
}
