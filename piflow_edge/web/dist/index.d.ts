/**
 * Run bundles of piflow-edge in a browser or in Node.js: the same picture for the same seed as in Python.
 *
 *     const generator = await load("bundles/mine");
 *     const { images } = await generator("a red apple", { seed: 0 });
 */
export { BundleError, Cancelled, EngineError, PiFlowError, RequestError } from "./errors.js";
export { drawNoise, type Seed } from "./noise.js";
export { load, Image } from "./generator.js";
export type { GenerateOptions, Generator, LoadOptions, Progress, Result, Subject } from "./generator.js";
export type { Asked } from "./conditioning.js";
export type { Recipe } from "./pictures/recipe.js";
