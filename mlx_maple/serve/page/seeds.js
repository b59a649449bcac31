// Seeds as digits: they reach 2^64, which a JavaScript number does not hold.

const MODULUS = 2n ** 64n;

/**
 * A new seed of 32 bits, which every other tool takes too.
 * @returns {string}
 */
export function rollSeed() {
  return String(crypto.getRandomValues(new Uint32Array(1))[0]);
}

/**
 * Whether a text is a seed that the server takes: a whole number from -2^63 to 2^64 - 1.
 * @param {string} text
 */
export function isSeed(text) {
  if (!/^-?\d{1,20}$/.test(text)) return false;
  const value = BigInt(text);
  return value >= -(2n ** 63n) && value < MODULUS;
}

/**
 * The seed that lies `count` after another; after the largest comes 0.
 * @param {string} seed
 * @param {number} count
 * @returns {string}
 */
export function seedAfter(seed, count) {
  const value = BigInt(seed) + BigInt(count);
  return String(value < MODULUS ? value : value - MODULUS);
}

/**
 * A stream of numbers in [0, 1) that a text fixes: the same seed chooses the same words.
 * mulberry32 over an FNV-1a hash of the text.
 * @param {string} text
 * @returns {() => number}
 */
export function seededRandom(text) {
  let state = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) {
    state = Math.imul(state ^ text.charCodeAt(i), 0x01000193);
  }
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}
