// Run by `node --test tests/serve/page/`.
import assert from "node:assert/strict";
import test from "node:test";
import { fieldOf, FIELDS, labelOf } from "../../../mlx_maple/serve/page/fields.js";
import { AXES, axisOf, cells, GridError, valuesOf } from "../../../mlx_maple/serve/page/grid.js";
import { SHAPES, sizeOf } from "../../../mlx_maple/serve/page/shapes.js";

test("a setting that only the server knows becomes a field", () => {
  const nullable = (schema) => ({ anyOf: [schema, { type: "null" }] });
  assert.deepEqual(fieldOf("token_merging", nullable({ type: "number", minimum: 0, maximum: 1 })), {
    label: "Token merging",
    kind: "number",
    low: 0,
    high: 1,
  });
  assert.deepEqual(fieldOf("kind_of", { type: "string", enum: ["a", "b"], description: "one" }), {
    label: "Kind of",
    kind: "word",
    options: [
      ["a", "a"],
      ["b", "b"],
    ],
    isNumber: false,
    title: "one",
  });
  assert.equal(fieldOf("bits", { enum: [0, 4, 8], type: "integer" }).isNumber, true);
  assert.equal(fieldOf("is_fast", nullable({ type: "boolean" })).kind, "flag");
  // What is not one value is no row: pictures, lists, text.
  assert.equal(fieldOf("guides", nullable({ type: "array", items: {} })), null);
  assert.equal(fieldOf("image", nullable({ type: "string", maxLength: 10 })), null);
  assert.equal(labelOf("constructor"), "Constructor");
});

test("a grid goes over any setting that is one value", () => {
  const ids = AXES.map((axis) => axis.id);
  assert.equal(new Set(ids).size, ids.length);
  for (const id of Object.keys(FIELDS)) {
    const isAxis = id !== "count" && FIELDS[id].hint !== undefined;
    assert.equal(ids.includes(id), isAxis, id);
  }
  const flag = axisOf("discard_penultimate");
  assert.throws(() => valuesOf(flag, "maybe"), GridError);
  const x = { axis: flag, values: valuesOf(flag, "true, false") };
  const y = { axis: axisOf("control"), values: ["0.5"] };
  const draw = {
    prompt: "a",
    controls: [
      { name: "c", weight: 1 },
      { name: "d", weight: 1 },
    ],
  };
  assert.deepEqual(
    cells(draw, x, y)[0].map((one) => [
      one.discard_penultimate,
      one.controls.map((control) => control.weight),
    ]),
    [
      [true, [0.5, 1]],
      [false, [0.5, 1]],
    ],
  );
});

test("shapes have as many pixels as the model's own size, about", () => {
  assert.deepEqual(sizeOf(1, 512, 512), [512, 512]);
  assert.deepEqual(sizeOf(16 / 9, 1024, 1024), [1344, 768]);
  assert.deepEqual(sizeOf(9 / 16, 1024, 1024), [768, 1344]);
  for (const own of [128, 512, 768, 1024]) {
    for (const [words, ratio] of SHAPES) {
      const [width, height] = sizeOf(ratio, own, own);
      assert.ok(width % 8 === 0 && height % 8 === 0, words);
      assert.ok(Math.abs(Math.log((width * height) / own ** 2)) < 0.2, `${words} of ${own}`);
      assert.ok(Math.abs(Math.log(width / height / ratio)) < 0.2, `${words} of ${own}`);
    }
  }
});
