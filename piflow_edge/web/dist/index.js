/**
 * Run bundles of piflow-edge in a browser or in Node.js: the same picture for the same seed as in Python.
 *
 *     const generator = await load("bundles/mine");
 *     const { images } = await generator("a red apple", { seed: 0 });
 */
export { BundleError, Cancelled, EngineError, PiFlowError, RequestError } from "./errors.js";
export { drawNoise } from "./noise.js";
export { load, Image } from "./generator.js";
