/** Networks, opened in ONNX Runtime. */
import type * as Ort from "onnxruntime-web";
import { Bundle } from "./bundle.js";
export type OrtModule = typeof Ort;
export type Arrays = Record<string, {
    data: Float32Array | BigInt64Array;
    shape: number[];
}>;
export interface SessionOptions {
    /** ONNX Runtime's module, where it is not to be imported as "onnxruntime-web": of another build, or onnxruntime-node. */
    ort?: OrtModule;
    /** Execution providers in ONNX Runtime's words, such as ["webgpu"]; else ["wasm"], or what onnxruntime-node takes. */
    executionProviders?: string[];
}
/** One opened network. */
export declare class Session {
    private readonly name;
    private readonly session;
    private readonly ort;
    private readonly inputs;
    private readonly outputs;
    private constructor();
    static open(bundle: Bundle, name: string, precision: string, ort: OrtModule, providers?: string[]): Promise<Session>;
    /** One call: arrays by the names of the network's inputs -> float32 by the names of its outputs. */
    run(arrays: Arrays): Promise<Record<string, Float32Array>>;
    close(): Promise<void>;
}
/** ONNX Runtime's module; it is told to send nothing before it loads. */
export declare function importOrt(): Promise<OrtModule>;
