// Dynamic prompts: {a|b} is one of several, __name__ is a line of the list of that name.
//
//   {red|green|blue} leaf        one of three
//   {3::red|blue} leaf           red three times as often
//   {2$$red|green|blue} leaf     two different ones, joined by ", "
//   a __animal__                 a line of the list "animal"
//
// They may lie in each other; a backslash before { | } or _ takes its meaning away. Nothing here
// knows the page.

/**
 * The user's lists: a name and its lines.
 * @typedef {Record<string, string[]>} Lists
 */

/**
 * @typedef {string | Choice} Part
 * @typedef {{many: number, options: {weight: number, parts: Part[]}[]}} Choice
 */

export const DEEPEST = 12; // lists that name lists that name themselves end here
export const LONGEST = 20000; // characters, as the server takes
const NAME = /^__([\p{L}\p{N}][\p{L}\p{N}/ -]*(?:_[\p{L}\p{N}/ -]+)*)__/u;

/** A prompt that cannot be expanded; the message is for the reader. */
export class PromptError extends Error {}

/**
 * Whether a text has anything to choose in it.
 * @param {string} text
 */
export function isDynamic(text) {
  return parse(text).some((part) => typeof part !== "string") || namesIn(text).length > 0;
}

/**
 * The names of the lists that a text asks for.
 * @param {string} text
 * @returns {string[]}
 */
export function namesIn(text) {
  const names = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else {
      const match = NAME.exec(text.slice(i, i + 100));
      if (match) {
        names.push(match[1]);
        i += match[0].length - 1;
      }
    }
  }
  return names;
}

/**
 * One prompt that a text may become.
 * @param {string} text
 * @param {Lists} lists
 * @param {() => number} random numbers in [0, 1)
 * @returns {string}
 * @throws {PromptError} where a list is missing or empty, or lists name each other without end
 */
export function expand(text, lists, random) {
  return tidy(text, chosen(parse(text), lists, random, 0));
}

/**
 * A text that becomes this one, whatever braces and names it holds: it was drawn with them.
 * @param {string} text
 */
export function literal(text) {
  return isDynamic(text) ? text.replace(/[{}]|_(?=_)/g, "\\$&") : text;
}

/**
 * The texts of a drawing that leave nothing to choose.
 * @param {{prompt: string, negative_prompt?: string | null}} draw
 * @returns {{prompt: string, negative_prompt?: string}}
 */
export function literals({ prompt, negative_prompt }) {
  return {
    prompt: literal(prompt),
    ...(negative_prompt && { negative_prompt: literal(negative_prompt) }),
  };
}

/**
 * Every prompt that a text may become, each once, the first ones first.
 * @param {string} text
 * @param {Lists} lists
 * @param {number} most how many at most
 * @returns {string[]}
 * @throws {PromptError} as `expand` does
 */
export function expandAll(text, lists, most) {
  const found = new Set();
  let tries = 100 * most; // where they repeat each other
  for (const one of combined(parse(text), lists, 0)) {
    found.add(tidy(text, one));
    if (found.size >= most || --tries === 0) break;
  }
  return [...found];
}

/**
 * @param {string} before
 * @param {string} after
 */
function tidy(before, after) {
  const plain = after.replace(/\\([{}|_])/g, "$1").slice(0, LONGEST);
  return before === plain ? plain : plain.replace(/[ \t]{2,}/g, " ").trim();
}

/**
 * A text in parts. A brace without its partner is a brace.
 * @param {string} text
 * @returns {Part[]}
 */
function parse(text) {
  const closing = partners(text);
  return parseRange(text, 0, text.length, closing);
}

/**
 * Where each opening brace is closed.
 * @param {string} text
 */
function partners(text) {
  const closing = new Map();
  const open = [];
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "{") open.push(i);
    else if (text[i] === "}" && open.length) closing.set(open.pop(), i);
  }
  return closing;
}

/**
 * @param {string} text
 * @param {number} start
 * @param {number} end
 * @param {Map<number, number>} closing
 * @returns {Part[]}
 */
function parseRange(text, start, end, closing) {
  /** @type {Part[]} */
  const parts = [];
  let plain = "";
  for (let i = start; i < end; i++) {
    const close = closing.get(i);
    if (text[i] === "\\") plain += text.slice(i, ++i + 1);
    else if (close === undefined) plain += text[i];
    else {
      if (plain) parts.push(plain);
      plain = "";
      parts.push(choice(text, i + 1, close, closing));
      i = close;
    }
  }
  if (plain) parts.push(plain);
  return parts;
}

/**
 * @param {string} text
 * @param {number} start
 * @param {number} end
 * @param {Map<number, number>} closing
 * @returns {Choice}
 */
function choice(text, start, end, closing) {
  const count = /^\s*(\d{1,2})\$\$/.exec(text.slice(start, Math.min(end, start + 12)));
  let from = start + (count ? count[0].length : 0);
  const options = [];
  for (let i = from; i <= end; i++) {
    const close = closing.get(i);
    if (text[i] === "\\") i++;
    else if (close !== undefined && i < end) i = close;
    else if (i === end || text[i] === "|") {
      const weight = /^\s*(\d+(?:\.\d+)?)::/.exec(text.slice(from, Math.min(i, from + 12)));
      const parts = parseRange(text, from + (weight ? weight[0].length : 0), i, closing);
      options.push({ weight: weight ? Number(weight[1]) : 1, parts });
      from = i + 1;
    }
  }
  return { many: count ? Number(count[1]) : 1, options };
}

/**
 * @param {Part[]} parts
 * @param {Lists} lists
 * @param {() => number} random
 * @param {number} depth
 * @returns {string}
 */
function chosen(parts, lists, random, depth) {
  let text = "";
  for (const part of parts) {
    if (typeof part === "string") text += fromLists(part, lists, random, depth);
    else {
      const left = [...part.options];
      const taken = [];
      while (left.length && taken.length < part.many) {
        const [option] = left.splice(pick(left, random), 1);
        taken.push(chosen(option.parts, lists, random, depth).trim());
      }
      text += taken.join(", ");
    }
  }
  return text;
}

/**
 * Where a weighted choice falls.
 * @param {{weight: number}[]} options
 * @param {() => number} random
 */
function pick(options, random) {
  let left = random() * options.reduce((sum, option) => sum + option.weight, 0);
  const place = options.findIndex((option) => (left -= option.weight) < 0);
  return Math.max(place, 0);
}

/**
 * @param {string} text
 * @param {Lists} lists
 * @param {() => number} random
 * @param {number} depth
 */
function fromLists(text, lists, random, depth) {
  let out = "";
  for (const piece of pieces(text)) {
    if (typeof piece === "string") out += piece;
    else {
      const lines = linesOf(piece.name, lists, depth);
      const line = lines[Math.floor(random() * lines.length)];
      out += chosen(parse(line), lists, random, depth + 1);
    }
  }
  return out;
}

/**
 * A text without braces as plain pieces and names of lists.
 * @param {string} text
 * @returns {(string | {name: string})[]}
 */
function pieces(text) {
  /** @type {(string | {name: string})[]} */
  const found = [];
  let plain = "";
  for (let i = 0; i < text.length; i++) {
    const match = text[i] === "_" ? NAME.exec(text.slice(i, i + 100)) : null;
    if (match) {
      found.push(plain, { name: match[1] });
      plain = "";
      i += match[0].length - 1;
    } else {
      plain += text[i];
      if (text[i] === "\\" && i + 1 < text.length) plain += text[++i];
    }
  }
  found.push(plain);
  return found;
}

/**
 * @param {string} name
 * @param {Lists} lists
 * @param {number} depth
 */
function linesOf(name, lists, depth) {
  if (depth >= DEEPEST) throw new PromptError(`the list "${name}" leads back to itself`);
  const lines = Object.hasOwn(lists, name) ? lists[name] : undefined;
  if (lines === undefined) {
    throw new PromptError(`there is no list "${name}": write one under Settings, Word lists`);
  }
  if (!lines.length) throw new PromptError(`the list "${name}" is empty`);
  return lines;
}

/**
 * Every text that parts may become, lazily.
 * @param {Part[]} parts
 * @param {Lists} lists
 * @param {number} depth
 * @returns {Generator<string>}
 */
function* combined(parts, lists, depth) {
  /** @type {(string | {name: string} | Choice)[]} */
  const flat = /** @type {any[]} */ (parts).flatMap((part) =>
    typeof part === "string" ? pieces(part) : [part],
  );
  yield* rest(0, "");

  /**
   * @param {number} at
   * @param {string} before
   * @returns {Generator<string>}
   */
  function* rest(at, before) {
    if (at === flat.length) {
      yield before;
      return;
    }
    for (const text of ways(flat[at], lists, depth)) yield* rest(at + 1, before + text);
  }
}

/**
 * @param {string | {name: string} | Choice} piece
 * @param {Lists} lists
 * @param {number} depth
 * @returns {Generator<string>}
 */
function* ways(piece, lists, depth) {
  if (typeof piece === "string") yield piece;
  else if ("name" in piece) {
    for (const line of linesOf(piece.name, lists, depth)) {
      yield* combined(parse(line), lists, depth + 1);
    }
  } else yield* several(piece.options, Math.min(piece.many, piece.options.length), lists, depth);
}

/**
 * `many` different options in their order.
 * @param {Choice["options"]} options
 * @param {number} many
 * @param {Lists} lists
 * @param {number} depth
 * @returns {Generator<string>}
 */
function* several(options, many, lists, depth) {
  if (many === 0) {
    yield "";
    return;
  }
  for (let i = 0; i + many <= options.length; i++) {
    for (const first of combined(options[i].parts, lists, depth)) {
      for (const others of several(options.slice(i + 1), many - 1, lists, depth)) {
        yield others ? `${first.trim()}, ${others}` : first.trim();
      }
    }
  }
}

/**
 * The lines of a list as it is written: one a line, empty ones and those after # left out.
 * @param {string} text
 * @returns {string[]}
 */
export function linesIn(text) {
  return text
    .split("\n")
    .map((line) => line.trim())
    .filter((line) => line && !line.startsWith("#"));
}
