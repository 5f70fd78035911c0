// Runs what a test asks the JavaScript package for: a list of commands as JSON on stdin, their answers on stdout.
import { readFileSync } from "node:fs";

const dist = new URL("../../piflow_edge/web/dist/", import.meta.url);
const { load, drawNoise } = await import(new URL("index.js", dist));
const { planSegments } = await import(new URL("schedule.js", dist));
const { planEvaluations } = await import(new URL("policies/solvers.js", dist));
const { openPolicy } = await import(new URL("policies/index.js", dist));
const { restore, toPixels } = await import(new URL("pictures/pixels.js", dist));
const { WordPiece } = await import(new URL("text/wordpiece.js", dist));

const floats = (list) => Float32Array.from(list);
const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

const COMMANDS = {
  noise: ({ seed, index, size, draw }) => base64(drawNoise(BigInt(seed), BigInt(index), size, draw)),
  segments: (settings) =>
    planSegments({ ...settings, h: Number(settings.h) }).map(({ sigmas, renoise }) => ({ sigmas: [...sigmas], renoise })),
  evaluations: ({ sigmas }) => planEvaluations(Float64Array.from(sigmas)),
  async integrate({ described, outputs, xSrc, start, size, sigmaSrc, temperature, sigmas }) {
    const arrays = Object.fromEntries(Object.entries(outputs).map(([name, values]) => [name, floats(values)]));
    const source = floats(xSrc);
    const policy = (await openPolicy(described)).open(arrays, source, size, sigmaSrc, temperature);
    return [...policy.integrate(start ? floats(start) : source, Float64Array.from(sigmas))];
  },
  pixels({ states, latent }) {
    const { data, shape } = restore(floats(states), latent);
    return { data: [...data], shape, images: toPixels(data, shape).map((image) => [...image.data]) };
  },
  tokens({ file, prompts, longest }) {
    const tokenizer = new WordPiece(readFileSync(file));
    return prompts.map((prompt) => tokenizer.encode(prompt, longest));
  },
  async draw({ bundle, open = {}, subject, options = {}, abortAfter, previews }) {
    const seen = [];
    const abort = new AbortController();
    const generator = await load(bundle, open);
    const onProgress = async (progress) => {
      const images = previews ? (await progress.preview()).map((image) => [...image.data]) : [];
      seen.push({ call: progress.call, nfe: progress.nfe, sigmaT: progress.sigmaT, first: progress.first, images });
      if (progress.call === abortAfter) abort.abort();
    };
    try {
      const { images, latents, timings } = await generator(subject, { ...options, onProgress, signal: abort.signal });
      return {
        images: images.map((image) => [...image.data]),
        latents: latents.map(base64),
        pngs: await Promise.all(images.map(async (image) => base64(await image.toPng()))),
        timings,
        seen,
      };
    } catch (error) {
      error.seen = seen;
      throw error;
    } finally {
      await generator.close();
    }
  },
};

const answers = [];
for (const { command, ...given } of JSON.parse(readFileSync(0, "utf-8"))) {
  try {
    answers.push({ answer: await COMMANDS[command](given) });
  } catch (error) {
    answers.push({ error: error.name, message: error.message, seen: error.seen });
  }
}
process.stdout.write(JSON.stringify(answers));
