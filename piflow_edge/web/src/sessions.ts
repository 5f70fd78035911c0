/** Networks, opened in ONNX Runtime. */

import type * as Ort from "onnxruntime-web";
import { Bundle, type TensorSpec } from "./bundle.js";
import { EngineError } from "./errors.js";
import { checkModel } from "./outline.js";

export type OrtModule = typeof Ort;
export type Arrays = Record<string, { data: Float32Array | BigInt64Array; shape: number[] }>;

export interface SessionOptions {
  /** ONNX Runtime's module, where it is not to be imported as "onnxruntime-web": of another build, or onnxruntime-node. */
  ort?: OrtModule;
  /** Execution providers in ONNX Runtime's words, such as ["webgpu"]; else ["wasm"], or what onnxruntime-node takes. */
  executionProviders?: string[];
}

/** One opened network. */
export class Session {
  private constructor(
    private readonly name: string,
    private readonly session: Ort.InferenceSession,
    private readonly ort: OrtModule,
    private readonly inputs: TensorSpec[],
    private readonly outputs: TensorSpec[],
  ) {}

  static async open(bundle: Bundle, name: string, precision: string, ort: OrtModule, providers?: string[]) {
    const [model, weights] = await bundle.readNetwork(name, precision);
    checkModel(model, Object.keys(weights));
    const { inputs, outputs } = bundle.manifest.networks[name];
    try {
      const session = await ort.InferenceSession.create(model, {
        ...(providers && { executionProviders: providers }),
        externalData: Object.entries(weights).map(([path, data]) => ({ path, data })),
      });
      return new Session(name, session, ort, inputs, outputs);
    } catch (error) {
      throw new EngineError(`the ${name} cannot be opened on ${providers ?? "the default"}: ${message(error)}`);
    }
  }

  /** One call: arrays by the names of the network's inputs -> float32 by the names of its outputs. */
  async run(arrays: Arrays): Promise<Record<string, Float32Array>> {
    const feeds: Record<string, Ort.Tensor> = {};
    for (const { name, dtype } of this.inputs) {
      const { data, shape } = arrays[name];
      feeds[name] = new this.ort.Tensor(dtype as "float32", data as Float32Array, shape);
    }
    let found: Ort.InferenceSession.ReturnType;
    try {
      found = await this.session.run(feeds);
    } catch (error) {
      throw new EngineError(`the ${this.name} failed: ${message(error)}`);
    }
    const outputs: Record<string, Float32Array> = {};
    for (const { name } of this.outputs) {
      const data = found[name].data;
      if (!(data instanceof Float32Array)) throw new EngineError(`${name} of the ${this.name} is not float32`);
      if (!data.every(Number.isFinite)) throw new EngineError(`the ${this.name} made NaN or infinity; take another precision`);
      outputs[name] = data;
    }
    return outputs;
  }

  close(): Promise<void> {
    return this.session.release();
  }
}

/** ONNX Runtime's module; it is told to send nothing before it loads. */
export async function importOrt(): Promise<OrtModule> {
  if (typeof process !== "undefined") process.env.ORT_DISABLE_TELEMETRY ??= "1"; // onnxruntime-node would send
  return import("onnxruntime-web");
}

function message(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
