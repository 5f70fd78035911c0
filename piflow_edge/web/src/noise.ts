/**
 * Starting noise: Philox4x32-10 and Box-Muller, bit for bit as `piflow_edge/noise.py` draws it.
 *
 * All is done in operations that IEEE 754 rounds alike everywhere: the logarithm, sine and cosine are written out as
 * their series, since libraries differ in the last bit.
 */

export type Seed = number | bigint;

const MULTIPLIERS = [0xd2511f53, 0xcd9e8d57] as const;
const WEYL = [0x9e3779b9, 0xbb67ae85] as const;
const LN_2 = 0.6931471805599453;
const ROOT_HALF = 0.7071067811865476;
const QUARTER = 1.5707963267948966;
const LOGARITHM = [21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1].map((n) => 1 / n);
const COSINE = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0].map((n) => (-1) ** n / factorial(2 * n));
const SINE = [8, 7, 6, 5, 4, 3, 2, 1, 0].map((n) => (-1) ** n / factorial(2 * n + 1));

/** Four random 32-bit words for a counter of four words and a key of two, written over the counter. */
export function philox(counter: Uint32Array, key0: number, key1: number): void {
  let [a, b, c, d] = counter as unknown as [number, number, number, number];
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(a, MULTIPLIERS[0]);
    const high1 = multiplyHigh(c, MULTIPLIERS[1]);
    const low0 = Math.imul(a, MULTIPLIERS[0]);
    const low1 = Math.imul(c, MULTIPLIERS[1]);
    a = (high1 ^ b ^ key0) >>> 0;
    b = low1 >>> 0;
    c = (high0 ^ d ^ key1) >>> 0;
    d = low0 >>> 0;
    key0 = (key0 + WEYL[0]) >>> 0;
    key1 = (key1 + WEYL[1]) >>> 0;
  }
  counter[0] = a;
  counter[1] = b;
  counter[2] = c;
  counter[3] = d;
}

/**
 * Standard normal noise of one image, the same on every machine.
 *
 * `seed`, `index`: whole numbers from 0 to 2^64 - 1. `draw`: 0 for the starting noise, i for what is added after the
 * i-th network call.
 */
export function drawNoise(seed: Seed, index: Seed, size: number, draw = 0): Float32Array {
  const [key0, key1] = splitWords(seed);
  const [index0, index1] = splitWords(index);
  const noise = new Float32Array(size);
  const words = new Uint32Array(4);
  for (let block = 0; 4 * block < size; block++) {
    words.set([block, draw, index0, index1]);
    philox(words, key0, key1);
    for (let pair = 0; pair < 2; pair++) {
      const radius = computeRadius(words[2 * pair] >>> 8);
      const [cosine, sine] = computeWaves(words[2 * pair + 1] >>> 8);
      const at = 4 * block + 2 * pair;
      if (at < size) noise[at] = cosine * radius; // stored as float32, which rounds once
      if (at + 1 < size) noise[at + 1] = sine * radius;
    }
  }
  return noise;
}

/** The low and the high 32 bits of a whole number from 0 to 2^64 - 1. */
export function splitWords(value: Seed): [number, number] {
  const whole = BigInt(value);
  return [Number(whole & 0xffffffffn), Number(whole >> 32n)];
}

/** The high 32 bits of a product of two 32-bit words. */
function multiplyHigh(a: number, b: number): number {
  const a0 = a & 0xffff;
  const a1 = a >>> 16;
  const b0 = b & 0xffff;
  const b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16); // below 2^32
  const other = a0 * b1 + (middle & 0xffff); // below 2^32
  return a1 * b1 + (middle >>> 16) + (other >>> 16);
}

/** sqrt(-2 ln u), u = (k + 0.5) / 2^24, for whole k below 2^24. */
function computeRadius(k: number): number {
  let m = (k + 0.5) * 2 ** -24;
  let power = 0;
  while (m < 0.5) {
    m *= 2; // exact
    power--;
  }
  if (m < ROOT_HALF) {
    m *= 2;
    power--;
  }
  const s = (m - 1) / (m + 1); // ln m = 2 (s + s^3 / 3 + s^5 / 5 + ...), |s| below 0.172
  return Math.sqrt(-2 * (power * LN_2 + 2 * s * evaluate(LOGARITHM, s * s)));
}

/** cos and sin of 2 pi (k + 0.5) / 2^24, for whole k below 2^24. */
function computeWaves(k: number): [number, number] {
  const quarter = (k + (1 << 21)) >> 22; // turns of 90 degrees, and what is left of one: -0.5 to 0.5
  const x = (k - (quarter << 22) + 0.5) * 2 ** -22 * QUARTER;
  let cosine = evaluate(COSINE, x * x);
  let sine = evaluate(SINE, x * x) * x;
  if (quarter & 1) [cosine, sine] = [sine, cosine];
  return [(quarter + 1) & 2 ? -cosine : cosine, quarter & 2 ? -sine : sine];
}

/** A polynomial by Horner's rule, the highest power's coefficient first. */
function evaluate(coefficients: number[], x: number): number {
  let value = coefficients[0];
  for (let i = 1; i < coefficients.length; i++) value = value * x + coefficients[i];
  return value;
}

function factorial(n: number): number {
  return n < 2 ? 1 : n * factorial(n - 1); // exact up to 18!
}
