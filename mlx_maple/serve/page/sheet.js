// A grid of two settings: a table that fills while it is drawn, and one picture of all of it.

import { byId, download, make, select, input, setOptions } from "./dom.js";
import { AXES, axisOf, cells, valuesOf } from "./grid.js";
import { whenEnded } from "./jobs.js";
import { complain } from "./say.js";
import { drawing, expanded, guarded, submit } from "./submit.js";

/** @typedef {import("./types.js").Picture} Picture */
/** @typedef {{axis: import("./grid.js").Axis, values: string[]}} Side */

/** The pictures of the grid, row by row. @type {(Picture | null)[][]} */
let pictures = [];
/** @type {{x: Side, y: Side | null}} */
let sides;
/** @type {(picture: Picture, all: Picture[]) => void} */
let open = () => {};

/** @param {(picture: Picture, all: Picture[]) => void} onOpen */
export function setUpSheet(onOpen) {
  open = onOpen;
  const options = AXES.map(({ id, label }) => ({ value: id, label }));
  setOptions(select("x-axis"), options);
  setOptions(select("y-axis"), [{ value: "", label: "nothing" }, ...options]);
  const hint = () => {
    for (const side of ["x", "y"]) {
      const id = select(`${side}-axis`).value;
      input(`${side}-values`).placeholder = (id && axisOf(id).hint) || "";
      input(`${side}-values`).disabled = !id;
    }
  };
  select("x-axis").addEventListener("change", hint);
  select("y-axis").addEventListener("change", hint);
  hint();
  byId("grid-draw").addEventListener("click", () => void guarded(drawGrid));
  byId("sheet-close").addEventListener("click", () => (byId("sheet-box").hidden = true));
  byId("sheet-save").addEventListener("click", () => save().catch(complain));
}

/** @param {"x" | "y"} name @returns {Side} */
function side(name) {
  const axis = axisOf(select(`${name}-axis`).value);
  return { axis, values: valuesOf(axis, input(`${name}-values`).value) };
}

async function drawGrid() {
  const x = side("x");
  const y = select("y-axis").value ? side("y") : null;
  // Choices in the prompt fall once, so that only the two settings differ.
  const rows = cells(expanded({ ...drawing(), count: 1 })[0], x, y);
  sides = { x, y };
  /** @type {(Picture | null)[][]} */
  const table = rows.map((row) => row.map(() => null));
  pictures = table;
  const places = show(rows.length, x.values.length);
  await submit(rows.flat(), (job, number) => {
    const [row, column] = [Math.floor(number / x.values.length), number % x.values.length];
    whenEnded(job.id, (ended) => {
      const picture = ended.pictures[0];
      const cell = places[row][column];
      if (!picture) return void (cell.textContent = ended.state);
      table[row][column] = picture;
      const press = () =>
        open(
          picture,
          table.flat().filter((one) => one !== null),
        );
      const words = `${x.values[column]}${y ? `, ${y.values[row]}` : ""}`;
      cell.replaceChildren(
        make(
          "button",
          { type: "button", "aria-label": words, onclick: press },
          make("img", { src: picture.url, alt: "" }),
        ),
      );
    });
  });
}

/**
 * An empty table with its heads.
 * @param {number} rows
 * @param {number} columns
 */
function show(rows, columns) {
  const { x, y } = sides;
  const places = Array.from({ length: rows }, () =>
    Array.from({ length: columns }, () => make("td", {}, "…")),
  );
  const heads = x.values.map((value) => make("th", { scope: "col" }, value));
  byId("sheet").replaceChildren(
    make(
      "caption",
      { className: "quiet" },
      `${x.axis.label} across${y ? `, ${y.axis.label} down` : ""}`,
    ),
    make("thead", {}, make("tr", {}, ...(y ? [make("td")] : []), ...heads)),
    make(
      "tbody",
      {},
      ...places.map((row, i) =>
        make("tr", {}, ...(y ? [make("th", { scope: "row" }, y.values[i])] : []), ...row),
      ),
    ),
  );
  byId("sheet-box").hidden = false;
  return places;
}

/** The whole grid with its heads as one PNG. */
async function save() {
  const found = pictures.flat().filter((picture) => picture !== null);
  if (!found.length) throw new Error("no picture of the grid is there yet");
  const width = Math.max(...found.map((picture) => picture.width));
  const height = Math.max(...found.map((picture) => picture.height));
  const { x, y } = sides;
  const [left, top] = [y ? 140 : 0, 36];
  const canvas = make("canvas", {
    width: left + width * x.values.length,
    height: top + height * pictures.length,
  });
  const brush = canvas.getContext("2d");
  if (!brush) throw new Error("this browser cannot paint");
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.fillStyle = "#000";
  brush.font = "16px system-ui, sans-serif";
  brush.textAlign = "center";
  brush.textBaseline = "middle";
  x.values.forEach((value, i) =>
    brush.fillText(value, left + (i + 0.5) * width, top / 2, width - 8),
  );
  y?.values.forEach((value, i) =>
    brush.fillText(value, left / 2, top + (i + 0.5) * height, left - 8),
  );
  for (const [row, line] of pictures.entries()) {
    for (const [column, picture] of line.entries()) {
      if (!picture) continue;
      const drawn = make("img", { src: picture.url });
      await drawn.decode();
      brush.drawImage(drawn, left + column * width, top + row * height);
    }
  }
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!blob) throw new Error("the grid is too large for one picture");
  download(blob, "maple-grid.png");
}
