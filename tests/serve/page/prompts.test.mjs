// Run by `node --test tests/serve/page/`.
import assert from "node:assert/strict";
import test from "node:test";
import {
  expand,
  expandAll,
  isDynamic,
  linesIn,
  literal,
  namesIn,
  PromptError,
} from "../../../mlx_maple/serve/page/prompts.js";
import { isSeed, seedAfter, seededRandom } from "../../../mlx_maple/serve/page/seeds.js";

const first = () => 0;
const last = () => 0.999999;

test("a text without choices stays as it is, spaces and brackets too", () => {
  for (const text of [
    "a red  leaf, (big:1.2) [a|b]",
    "",
    "a { b",
    "} x",
    "snake_case __ x",
    "5__",
  ]) {
    assert.equal(isDynamic(text), false, text);
    assert.equal(expand(text, {}, first), text);
  }
});

test("a choice takes one of its options", () => {
  assert.equal(expand("a {red|blue} leaf", {}, first), "a red leaf");
  assert.equal(expand("a {red|blue} leaf", {}, last), "a blue leaf");
  assert.equal(expand("a {|big} leaf", {}, first), "a leaf");
  assert.equal(expand("{a {b|c}|d}", {}, first), "a b");
});

test("a backslash takes the meaning away", () => {
  assert.equal(expand(String.raw`\{a|b\}`, {}, first), "{a|b}");
  assert.equal(expand(String.raw`{a\|b|c}`, {}, first), "a|b");
  assert.equal(expand(String.raw`\__x__`, {}, first), "__x__");
});

test("weights and counts", () => {
  const random = seededRandom("weights");
  let red = 0;
  for (let i = 0; i < 4000; i++) red += Number(expand("{3::red|blue}", {}, random) === "red");
  assert.ok(Math.abs(red / 4000 - 0.75) < 0.03, String(red));
  assert.equal(expand("{2$$a|b|c}", {}, first), "a, b");
  assert.equal(expand("{9$$a|b}", {}, first), "a, b");
});

test("lists give lines, which may have choices in them", () => {
  const lists = { animal: ["cat", "{big|small} dog"], my_list: ["x"] };
  assert.equal(expand("a __animal__", lists, first), "a cat");
  assert.equal(expand("a __animal__", lists, last), "a small dog");
  assert.equal(expand("{__animal__|fish}", lists, first), "cat");
  assert.equal(expand("__my_list__", lists, first), "x");
  assert.deepEqual(namesIn("__animal__ on __place__"), ["animal", "place"]);
  assert.deepEqual(linesIn("a\n\n # no\n b "), ["a", "b"]);
});

test("what cannot be expanded says why", () => {
  const says = (text, lists, pattern) =>
    assert.throws(
      () => expand(text, lists, first),
      (e) => e instanceof PromptError && pattern.test(e.message),
    );
  says("__none__", {}, /no list "none"/);
  says("__toString__", {}, /no list/);
  says("__e__", { e: [] }, /empty/);
  says("__a__", { a: ["__b__"], b: ["__a__"] }, /leads back/);
  assert.throws(() => expandAll("__a__", { a: ["x __a__"] }, 5), PromptError);
});

test("the words of a picture are drawn again as they are", () => {
  for (const text of ["{masterpiece}, a {red|blue} leaf", "a __animal__ in {x", "a_b __ c", "plain"])
    assert.equal(expand(literal(text), {}, () => 0), text);
  assert.equal(literal("a } b {"), "a } b {"); // nothing to choose: as it is
  assert.equal(expand("\\{red\\}", {}, () => 0), "{red}");
});

test("every combination, each once and not more than asked for", () => {
  assert.deepEqual(expandAll("{a|b} {1|2}", {}, 99), ["a 1", "a 2", "b 1", "b 2"]);
  assert.deepEqual(expandAll("{2$$a|b|c}", {}, 99), ["a, b", "a, c", "b, c"]);
  assert.deepEqual(expandAll("{a|a} x", {}, 99), ["a x"]);
  assert.equal(expandAll("{a|b|c|d}".repeat(20), {}, 32).length, 32); // 4^20 are never made
  assert.deepEqual(expandAll("a __l__", { l: ["1", "{2|3}"] }, 99), ["a 1", "a 2", "a 3"]);
});

test("the same seed chooses the same words", () => {
  const draw = (seed) =>
    Array.from({ length: 8 }, () => expand("{a|b|c|d}", {}, seededRandom(seed)));
  assert.deepEqual(draw("7"), draw("7"));
  const seen = new Set(
    Array.from({ length: 40 }, (_, i) => expand("{a|b|c|d}", {}, seededRandom(String(i)))),
  );
  assert.equal(seen.size, 4);
});

test("seeds of 64 bits", () => {
  assert.equal(seedAfter("18446744073709551615", 1), "0");
  assert.equal(seedAfter("9007199254740993", 1), "9007199254740994");
  for (const good of ["0", "-1", "18446744073709551615"]) assert.ok(isSeed(good), good);
  for (const bad of ["", "1.5", "x", "18446744073709551616", "-9223372036854775809", "1e3"])
    assert.ok(!isSeed(bad), bad);
});
