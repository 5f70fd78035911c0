/** Every error that is raised on purpose, under one root. A message says what holds, what came and what to do. */
export declare class PiFlowError extends Error {
    name: string;
}
/** A bundle that is incomplete, altered, or of another version. */
export declare class BundleError extends PiFlowError {
}
/** Something that cannot steer these images, or a setting out of range. */
export declare class RequestError extends PiFlowError {
}
/** A network that cannot run here, or that failed. */
export declare class EngineError extends PiFlowError {
}
/** The caller's signal was aborted. */
export declare class Cancelled extends PiFlowError {
}
