/**
 * What an ONNX file reaches for, read before an engine opens it: files that it keeps weights in, and domains of
 * operators. An engine follows whatever a graph says; so a graph is opened only if each file came with it.
 */
/** Refuse a model that keeps weights in files which did not come with it, or uses operators of unknown domains. */
export declare function checkModel(model: Uint8Array, files: string[]): void;
