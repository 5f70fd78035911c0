/** Draws in a thread of its own, so that the page goes on meanwhile. */

import { Cancelled, load, type Generator, type Image } from "../index.js";
import { toRGBA } from "../pictures/pixels.js";
import type { OrtModule } from "../sessions.js";
import type { Answer, Order, Picture, Wish } from "./site.js";

/** Builds of ONNX Runtime, by execution provider. */
const BUILDS: Record<string, string> = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };

let generator: Generator | null = null;
let abort = new AbortController();

self.addEventListener("message", async ({ data }: MessageEvent<Order>) => {
  if (data.kind === "stop") abort.abort();
  else {
    try {
      if (data.kind === "open") await open(data.bundle, data.ort, data.provider);
      else await draw(data.wish);
    } catch (error) {
      answer({ kind: "failed", message: (error as Error).message, isCancelled: error instanceof Cancelled });
    }
  }
});

async function open(bundle: string, folder: string, provider: string): Promise<void> {
  const began = performance.now();
  const ort: OrtModule = await import(folder + BUILDS[provider]);
  generator = await load(bundle, { ort, executionProviders: [provider] });
  answer({ kind: "opened", ms: performance.now() - began });
}

async function draw({ subject, seed, nfe }: Wish): Promise<void> {
  if (generator === null) throw new Error("the bundle is not open yet");
  abort = new AbortController();
  const { images, timings } = await generator(subject, {
    seed,
    nfe,
    signal: abort.signal,
    onProgress: async ({ call, preview }) => {
      const seen = call < nfe ? toPicture((await preview())[0]) : null;
      answer({ kind: "report", report: { call, nfe, preview: seen } });
      await new Promise((resolve) => setTimeout(resolve)); // lets "stop" in
    },
  });
  const file = new Blob([await images[0].toPng()], { type: "image/png" });
  answer({ kind: "drawn", drawn: { picture: toPicture(images[0]), file, timings } });
}

function toPicture(image: Image): Picture {
  return { width: image.width, height: image.height, rgba: toRGBA(image) };
}

function answer(message: Answer): void {
  self.postMessage(message);
}
