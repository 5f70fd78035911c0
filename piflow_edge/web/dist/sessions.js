/** Networks, opened in ONNX Runtime. */
import { EngineError } from "./errors.js";
import { checkModel } from "./outline.js";
/** One opened network. */
export class Session {
    name;
    session;
    ort;
    inputs;
    outputs;
    constructor(name, session, ort, inputs, outputs) {
        this.name = name;
        this.session = session;
        this.ort = ort;
        this.inputs = inputs;
        this.outputs = outputs;
    }
    static async open(bundle, name, precision, ort, providers) {
        const [model, weights] = await bundle.readNetwork(name, precision);
        checkModel(model, Object.keys(weights));
        const { inputs, outputs } = bundle.manifest.networks[name];
        try {
            const session = await ort.InferenceSession.create(model, {
                ...(providers && { executionProviders: providers }),
                externalData: Object.entries(weights).map(([path, data]) => ({ path, data })),
            });
            return new Session(name, session, ort, inputs, outputs);
        }
        catch (error) {
            throw new EngineError(`the ${name} cannot be opened on ${providers ?? "the default"}: ${message(error)}`);
        }
    }
    /** One call: arrays by the names of the network's inputs -> float32 by the names of its outputs. */
    async run(arrays) {
        const feeds = {};
        for (const { name, dtype } of this.inputs) {
            const { data, shape } = arrays[name];
            feeds[name] = new this.ort.Tensor(dtype, data, shape);
        }
        let found;
        try {
            found = await this.session.run(feeds);
        }
        catch (error) {
            throw new EngineError(`the ${this.name} failed: ${message(error)}`);
        }
        const outputs = {};
        for (const { name } of this.outputs) {
            const data = found[name].data;
            if (!(data instanceof Float32Array))
                throw new EngineError(`${name} of the ${this.name} is not float32`);
            if (!data.every(Number.isFinite))
                throw new EngineError(`the ${this.name} made NaN or infinity; take another precision`);
            outputs[name] = data;
        }
        return outputs;
    }
    close() {
        return this.session.release();
    }
}
/** ONNX Runtime's module; it is told to send nothing before it loads. */
export async function importOrt() {
    if (typeof process !== "undefined")
        process.env.ORT_DISABLE_TELEMETRY ??= "1"; // onnxruntime-node would send
    return import("onnxruntime-web");
}
function message(error) {
    return error instanceof Error ? error.message : String(error);
}
