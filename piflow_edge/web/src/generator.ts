/** The generator an app embeds: a bundle, opened, that makes images. */

import { Bundle, DECODER, imageSize, type OpenOptions } from "./bundle.js";
import { openConditioner, type Asked, type Conditioner } from "./conditioning.js";
import { Cancelled, RequestError } from "./errors.js";
import { drawNoise, type Seed } from "./noise.js";
import { restore, toPixels, toRGBA, type Pixels } from "./pictures/pixels.js";
import { encodePng } from "./pictures/png.js";
import { buildRecipe, writeRecipe, type Recipe } from "./pictures/recipe.js";
import { openPolicy, type Policy, type PolicyKind } from "./policies/index.js";
import { readSolver, type Solver } from "./policies/solvers.js";
import { planSegments, publishedTemperature, type Segment } from "./schedule.js";
import { importOrt, Session, type Arrays, type SessionOptions } from "./sessions.js";
import { RELEASE } from "./release.js";

const STUDENT = "student";
/** Images that share a network call. */
const BATCH_SIZE = 16;

export interface LoadOptions extends OpenOptions, SessionOptions {
  /** One of the bundle's; else its first. */
  precision?: string;
}

/** How far one batch of images is. */
export interface Progress {
  /** Network calls made, of `nfe`. */
  call: number;
  nfe: number;
  /** The noise level. */
  sigmaT: number;
  /** Number of the first of these images in the whole call. */
  first: number;
  /** Images as the policy now sees them: worked out when it is called, at no network call but the decoder's. */
  preview(): Promise<Image[]>;
}

/** How to sample; what is left out is the bundle's. */
export interface GenerateOptions {
  /** Of the noise: a whole number from 0 to 2^64 - 1; image i is number i of it. Or a pair (seed, index) for each image. */
  seed?: Seed | [Seed, Seed][];
  nfe?: number;
  substeps?: number;
  temperature?: number | "auto";
  h?: number | "inf";
  /**
   * "euler", as the student was trained, or "multistep", which ends some 1e-3 from there. It takes less time for policy
   * "gmk", and more for "gm", which is compiled.
   */
  solver?: Solver;
  /** Is awaited after every network call and its rollout. */
  onProgress?: (progress: Progress) => void | Promise<void>;
  /** Aborted, it ends the call with `Cancelled` before the next network call. */
  signal?: AbortSignal;
}

/** One image, and how to make it again. */
export class Image implements Pixels {
  constructor(
    private readonly pixels: Pixels,
    readonly recipe?: Recipe,
  ) {}

  get width() {
    return this.pixels.width;
  }
  get height() {
    return this.pixels.height;
  }
  get channels() {
    return this.pixels.channels;
  }
  /** A byte for each channel of each pixel, row by row. */
  get data() {
    return this.pixels.data;
  }

  /** For a canvas. */
  toImageData(): ImageData {
    return new ImageData(toRGBA(this.pixels), this.width, this.height);
  }

  /** A PNG file that holds the recipe. */
  toPng(): Promise<Uint8Array<ArrayBuffer>> {
    return encodePng(this.pixels, this.recipe && writeRecipe(this.recipe));
  }
}

export interface Result {
  images: Image[];
  /** float32 for each image, (C, H, W). */
  latents: Float32Array[];
  /** Milliseconds of each stage. */
  timings: { noise: number; network: number; policy: number; decode: number; total: number };
}

/** Open a bundle: the address of its folder on a web server or, in Node.js, its path. */
export async function load(address: string | URL, options: LoadOptions = {}): Promise<Generator> {
  const bundle = await Bundle.open(address, options);
  const kind = await openPolicy(bundle.manifest.policy);
  const precision = options.precision ?? bundle.manifest.precisions[0];
  const ort = options.ort ?? (await importOrt());
  const providers = options.executionProviders ?? (options.ort ? undefined : ["wasm"]);
  const names = Object.keys(bundle.manifest.networks).filter(
    (name) => name === STUDENT || name === DECODER || name.startsWith("encoder."),
  );
  const sessions: Record<string, Session> = {};
  for (const name of names) sessions[name] = await Session.open(bundle, name, precision, ort, providers);
  const conditioner = await openConditioner(bundle, (name, arrays) => sessions[name].run(arrays));
  const device = providers?.join(",") ?? "default";
  const generate = new Drawing(bundle, precision, sessions, conditioner, kind, device);
  const call = (subject: Subject, settings: GenerateOptions = {}) => generate.make(subject, settings);
  return Object.assign(call, { bundle, close: () => generate.close() });
}

/** What steers: a bare value is what the bundle is asked with: prompts, labels or a count. */
export type Subject = Asked | string | number | (string | number)[];

/** Makes images. One call at a time: ONNX Runtime runs one. */
export type Generator = ((subject: Subject, options?: GenerateOptions) => Promise<Result>) & {
  bundle: Bundle;
  /** Free the networks' memory. */
  close(): Promise<void>;
};

interface Plan {
  segments: Segment[];
  temperature: number;
  carry: ReturnType<typeof readSolver>;
  settings: Recipe["settings"];
}

class Drawing {
  private readonly shape: [number, number, number];
  private queue: Promise<unknown> = Promise.resolve();

  constructor(
    private readonly bundle: Bundle,
    private readonly precision: string,
    private readonly sessions: Record<string, Session>,
    private readonly conditioner: Conditioner,
    private readonly kind: PolicyKind,
    private readonly device: string,
  ) {
    this.shape = bundle.manifest.latent.shape;
  }

  make(subject: Subject, options: GenerateOptions): Promise<Result> {
    const made = this.queue.then(() => this.draw(subject, options));
    this.queue = made.catch(() => undefined);
    return made;
  }

  async close(): Promise<void> {
    await this.queue;
    for (const session of Object.values(this.sessions)) await session.close();
  }

  private async draw(subject: Subject, options: GenerateOptions): Promise<Result> {
    const began = performance.now();
    const { arrays, descriptions } = await this.conditioner.encode(this.readSubject(subject));
    const plan = this.plan(options);
    const seeds = readSeeds(options.seed ?? 0, descriptions.length);
    const result: Result = { images: [], latents: [], timings: { noise: 0, network: 0, policy: 0, decode: 0, total: 0 } };
    for (let first = 0; first < descriptions.length; first += BATCH_SIZE) {
      const piece = seeds.slice(first, first + BATCH_SIZE);
      const steering = takePiece(arrays, first, piece.length);
      const latents = await this.sample(plan, piece, steering, options, first, result.timings);
      const recipes = piece.map((pair, i) => this.describe(descriptions[first + i], pair, plan));
      const images = await this.decode(latents, recipes, result.timings);
      result.images.push(...images);
      const size = latents.length / piece.length;
      piece.forEach((_, i) => result.latents.push(latents.slice(i * size, (i + 1) * size)));
    }
    result.timings.total = performance.now() - began;
    return result;
  }

  private readSubject(subject: Subject): Asked {
    const isBare = typeof subject !== "object" || Array.isArray(subject);
    return isBare ? ({ [this.conditioner.positional]: subject } as Asked) : subject;
  }

  /** The sampling loop: a network call at the start of every segment, whose policy is integrated to its end. */
  private async sample(
    plan: Plan,
    seeds: [Seed, Seed][],
    steering: Arrays,
    options: GenerateOptions,
    first: number,
    timings: Result["timings"],
  ): Promise<Float32Array> {
    const [channels, height, width] = this.shape;
    const size = { batch: seeds.length, channels, pixels: height * width };
    let state = measure(timings, "noise", () => this.drawNoises(seeds, 0));
    const { segments } = plan;
    for (const [i, { sigmas, renoise }] of segments.entries()) {
      if (options.signal?.aborted) throw new Cancelled(`stopped after ${i} network calls, as was asked for`);
      const before = performance.now();
      const outputs = await this.callStudent(state, sigmas[0], steering, seeds.length);
      timings.network += performance.now() - before;
      const temperature = i < segments.length - 1 ? plan.temperature : 1;
      const policy = this.kind.open(outputs, state, size, sigmas[0], temperature);
      state = measure(timings, "policy", () => plan.carry(policy, state, sigmas));
      const sigmaT = sigmas[sigmas.length - 1];
      if (options.onProgress) {
        const seen = state;
        const preview = () => this.preview(policy, seen, sigmaT, timings);
        await options.onProgress({ call: i + 1, nfe: segments.length, sigmaT, first, preview });
      }
      if (renoise) {
        const fresh = this.drawNoises(seeds, i + 1);
        state = state.map((value, at) => renoise[0] * value + renoise[1] * fresh[at]);
      }
    }
    if (options.signal?.aborted) throw new Cancelled("stopped after the last network call, as was asked for");
    return state;
  }

  private callStudent(state: Float32Array, sigmaT: number, steering: Arrays, batch: number) {
    return this.sessions[STUDENT].run({
      x_t: { data: state, shape: [batch, ...this.shape] },
      t: { data: new Float32Array(batch).fill(sigmaT), shape: [batch] },
      ...steering,
    });
  }

  private drawNoises(seeds: [Seed, Seed][], draw: number): Float32Array {
    const size = this.shape[0] * this.shape[1] * this.shape[2];
    const noise = new Float32Array(seeds.length * size);
    seeds.forEach(([seed, index], i) => noise.set(drawNoise(seed, index, size, draw), i * size));
    return noise;
  }

  /** An Euler step down to 0 ends in the policy's estimate of the clean latents. */
  private preview(policy: Policy, state: Float32Array, sigmaT: number, timings: Result["timings"]): Promise<Image[]> {
    const estimate = sigmaT > 0 ? policy.integrate(state, Float64Array.of(sigmaT, 0)) : state;
    return this.decode(estimate, [], timings);
  }

  private async decode(latents: Float32Array, recipes: Recipe[], timings: Result["timings"]): Promise<Image[]> {
    const before = performance.now();
    let { data, shape } = restore(latents, this.bundle.manifest.latent);
    if (this.sessions[DECODER]) {
      const spec = this.bundle.manifest.networks[DECODER];
      const outputs = await this.sessions[DECODER].run({ [spec.inputs[0].name]: { data, shape } });
      data = outputs[spec.outputs[0].name];
      shape = [shape[0], spec.outputs[0].shape[1] as number, ...imageSize(this.bundle.manifest)];
    }
    const images = toPixels(data, shape).map((pixels, i) => new Image(pixels, recipes[i]));
    timings.decode += performance.now() - before;
    return images;
  }

  /** The settings with nothing left open, and what they make. */
  private plan(options: GenerateOptions): Plan {
    const { schedule } = this.bundle.manifest;
    const nfe = options.nfe ?? schedule.nfe;
    const substeps = options.substeps ?? schedule.total_substeps;
    const h = options.h ?? (schedule.h as number | "inf");
    const asked = options.temperature ?? schedule.temperature;
    const temperature = asked === "auto" ? publishedTemperature(nfe) : Number(asked);
    if (!(temperature >= 0 && temperature < Infinity)) {
      throw new RequestError(`temperature is 0 or more, or "auto"; got ${asked}`);
    }
    const segments = planSegments({
      nfe,
      shift: schedule.shift,
      finalStepSizeScale: schedule.final_step_size_scale,
      totalSubsteps: substeps,
      h: Number(h === "inf" ? Infinity : h),
      substepRule: schedule.substep_rule,
    });
    const [height, width] = imageSize(this.bundle.manifest);
    const solver = options.solver ?? "euler";
    const rest = { solver, strength: 1, resamples: 0, height, width };
    return { segments, temperature, carry: readSolver(solver), settings: { nfe, substeps, temperature, h, ...rest } };
  }

  private describe(conditioning: object, pair: [Seed, Seed], plan: Plan): Recipe {
    return buildRecipe({
      bundle: this.bundle.manifest.name,
      bundle_sha256: this.bundle.sha256,
      precision: this.precision,
      engine: "onnxruntime-web",
      device: this.device,
      conditioning: [conditioning],
      seeds: [pair],
      settings: plan.settings,
      release: RELEASE,
    });
  }
}

function readSeeds(seed: Seed | [Seed, Seed][], count: number): [Seed, Seed][] {
  const pairs = Array.isArray(seed) ? seed : Array.from({ length: count }, (_, i): [Seed, Seed] => [seed, i]);
  if (pairs.length !== count) throw new RequestError(`give one (seed, index) per image: ${count} images, ${pairs.length} pairs`);
  for (const number of pairs.flat()) {
    const isWhole = typeof number === "bigint" || Number.isSafeInteger(number);
    if (!isWhole || number < 0 || BigInt(number) >= 1n << 64n) {
      throw new RequestError(`a seed is a whole number from 0 to 2^64 - 1, above 2^53 a BigInt; got ${number}`);
    }
  }
  return pairs;
}

function takePiece(arrays: Arrays, first: number, count: number): Arrays {
  return Object.fromEntries(
    Object.entries(arrays).map(([name, { data, shape }]) => {
      const size = data.length / shape[0];
      return [name, { data: data.slice(first * size, (first + count) * size), shape: [count, ...shape.slice(1)] }];
    }),
  );
}

function measure<T>(timings: Result["timings"], stage: "noise" | "policy", compute: () => T): T {
  const before = performance.now();
  const made = compute();
  timings[stage] += performance.now() - before;
  return made;
}
