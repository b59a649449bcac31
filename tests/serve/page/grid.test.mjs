// Run by `node --test tests/serve/page/`.
import assert from "node:assert/strict";
import test from "node:test";
import {
  axisOf,
  cells,
  GridError,
  splitList,
  valuesOf,
} from "../../../mlx_maple/serve/page/grid.js";

const values = (id, text) => valuesOf(axisOf(id), text);
const refused = (run, pattern) =>
  assert.throws(run, (e) => e instanceof GridError && pattern.test(e.message));

test("lists and ranges, as A1111 writes them", () => {
  assert.deepEqual(values("steps", "4, 8,16"), ["4", "8", "16"]);
  assert.deepEqual(values("steps", "1-5"), ["1", "2", "3", "4", "5"]);
  assert.deepEqual(values("steps", "10-30 (+10), 50"), ["10", "20", "30", "50"]);
  assert.deepEqual(values("guidance_scale", "0-1 [5]"), ["0", "0.25", "0.5", "0.75", "1"]);
  assert.deepEqual(values("guidance_scale", "0.1-0.3 (+0.1)"), ["0.1", "0.2", "0.3"]);
  assert.deepEqual(values("guidance_scale", "-1-1"), ["-1", "0", "1"]);
  assert.deepEqual(values("seed", "5-3"), ["5", "4", "3"]);
  assert.deepEqual(values("seed", "18446744073709551615"), ["18446744073709551615"]);
});

test("words keep dashes, and commas in quotes", () => {
  assert.deepEqual(values("sampler", "ddim, dpmpp_2m"), ["ddim", "dpmpp_2m"]);
  assert.deepEqual(splitList('red, "big, blue", "say ""hi"""'), ["red", "big, blue", 'say "hi"']);
  assert.deepEqual(values("prompt", "1-3"), ["1-3"]);
});

test("what makes no grid says why", () => {
  refused(() => values("steps", ""), /no values/);
  refused(() => values("steps", "2.5"), /not whole/);
  refused(() => values("steps", "many"), /no number/);
  refused(() => values("steps", "0"), /out of range/);
  refused(() => values("strength", "0-2"), /out of range/);
  refused(() => values("steps", "1-1000000"), /at most/);
  refused(() => values("steps", "5-1 (+1)"), /nowhere/);
  refused(() => values("guidance_scale", "1-2 (+0)"), /nowhere/);
  refused(() => axisOf("constructor"), /no setting/);
});

test("a drawing for each pair, row by row", () => {
  const x = { axis: axisOf("prompt"), values: ["red", "blue"] };
  const y = { axis: axisOf("steps"), values: ["2", "4"] };
  const rows = cells({ prompt: "a red leaf", count: 4, seed: "7" }, x, y);
  assert.deepEqual(
    rows.map((row) => row.map((d) => [d.prompt, d.steps, d.count, d.seed])),
    [
      [
        ["a red leaf", 2, 1, "7"],
        ["a blue leaf", 2, 1, "7"],
      ],
      [
        ["a red leaf", 4, 1, "7"],
        ["a blue leaf", 4, 1, "7"],
      ],
    ],
  );
  assert.equal(cells({ prompt: "x" }, y, null).length, 1);
  refused(() => cells({ prompt: "leaf" }, x, null), /not in the prompt/);
  refused(() => cells({ prompt: "red" }, x, x), /differ/);
});

test("$ in a replacement is a dollar", () => {
  const rows = cells({ prompt: "red" }, { axis: axisOf("prompt"), values: ["red", "$& $1"] }, null);
  assert.equal(rows[0][1].prompt, "$& $1");
});

test("a schedule on the other axis outlives the sampler's change", () => {
  const sampler = { axis: axisOf("sampler"), values: ["euler"] };
  const schedule = { axis: axisOf("schedule"), values: ["karras"] };
  for (const [x, y] of [
    [sampler, schedule],
    [schedule, sampler],
  ]) {
    const [[draw]] = cells({ prompt: "x", schedule: "leading" }, x, y);
    assert.deepEqual([draw.sampler, draw.schedule], ["euler", "karras"]);
  }
  assert.equal(
    cells({ prompt: "x", schedule: "leading" }, sampler, null)[0][0].schedule,
    undefined,
  );
});

test("the weight of a LoRA", () => {
  const x = { axis: axisOf("lora"), values: ["0", "1"] };
  const [[a, b]] = cells({ prompt: "x", loras: [{ name: "l", weight: 0.5 }] }, x, null);
  assert.deepEqual([a.loras[0].weight, b.loras[0].weight], [0, 1]);
  refused(() => cells({ prompt: "x" }, x, null), /none is chosen/);
});
