// Run by `node --test tests/serve/page/`.
import assert from "node:assert/strict";
import test from "node:test";
import {
  elapsed,
  progressWords,
  seconds,
  settingRows,
} from "../../../mlx_maple/serve/page/words.js";

const progress = {
  stage: "sample",
  step: 3,
  total: 20,
  fraction: 0.15,
  seconds_per_step: 0.05,
  seconds_left: 0.85,
  detail: "",
};

test("how far a drawing is", () => {
  assert.equal(progressWords(progress), "Step 3 of 20 · 0.05 s/step · 0.8 s left");
  assert.equal(
    progressWords({ ...progress, seconds_per_step: 12.4, seconds_left: 210 }),
    "Step 3 of 20 · 12 s/step · 3 min 30 s left",
  );
  assert.equal(progressWords({ ...progress, step: 0, seconds_per_step: 0 }), "Step 0 of 20");
  assert.equal(
    progressWords({ ...progress, stage: "loading", detail: "sd15" }),
    "Loading the model · sd15…",
  );
  assert.equal(progressWords(null), "Starting…");
});

test("times", () => {
  assert.deepEqual([0, -1, 9.94, 9.96, 59.6, 3600, 7265].map(seconds), [
    "0.0 s",
    "0.0 s",
    "9.9 s",
    "10 s",
    "1 min 0 s",
    "1 h 0 min",
    "2 h 1 min",
  ]);
  const picture = { seed_text: "7" };
  assert.equal(
    elapsed({ started: 1, finished: 3.5, pictures: [picture] }),
    "Done in 2.5 s · seed 7",
  );
  assert.equal(
    elapsed({ started: 1, finished: 3.5, pictures: [picture, picture] }),
    "2 pictures in 2.5 s · seed 7",
  );
  assert.equal(elapsed({ started: null, finished: null, pictures: [] }), "Done.");
});

test("settings, the usual ones first, empty ones not at all", () => {
  const { first, rest } = settingRows({
    zeta: 1,
    hires_scale: null,
    variation_strength: 0,
    mask_blur: 4,
    only_masked: 0, // which is something
    guidance_scale: 0,
    seed: 0,
    prompt: "a leaf",
    negative_prompt: "",
    vae: null,
    width: 64,
    height: 128,
    hashes: {},
    some_thing: [1],
  });
  assert.deepEqual(first, [
    ["Prompt", "a leaf"],
    ["Seed", "0"],
    ["Size", "64 × 128"],
    ["Guidance", "0"],
    ["Mask's padding", "0"],
    ["Mask's blur", "4"],
  ]);
  assert.deepEqual(rest, [
    ["Zeta", "1"],
    ["Variation", "0"],
    ["Some thing", "[1]"],
  ]);
});
