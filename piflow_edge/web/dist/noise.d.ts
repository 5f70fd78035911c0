/**
 * Starting noise: Philox4x32-10 and Box-Muller, bit for bit as `piflow_edge/noise.py` draws it.
 *
 * All is done in operations that IEEE 754 rounds alike everywhere: the logarithm, sine and cosine are written out as
 * their series, since libraries differ in the last bit.
 */
export type Seed = number | bigint;
/** Four random 32-bit words for a counter of four words and a key of two, written over the counter. */
export declare function philox(counter: Uint32Array, key0: number, key1: number): void;
/**
 * Standard normal noise of one image, the same on every machine.
 *
 * `seed`, `index`: whole numbers from 0 to 2^64 - 1. `draw`: 0 for the starting noise, i for what is added after the
 * i-th network call.
 */
export declare function drawNoise(seed: Seed, index: Seed, size: number, draw?: number): Float32Array;
/** The low and the high 32 bits of a whole number from 0 to 2^64 - 1. */
export declare function splitWords(value: Seed): [number, number];
