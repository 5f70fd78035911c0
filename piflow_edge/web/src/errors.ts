/** Every error that is raised on purpose, under one root. A message says what holds, what came and what to do. */
export class PiFlowError extends Error {
  override name = this.constructor.name;
}

/** A bundle that is incomplete, altered, or of another version. */
export class BundleError extends PiFlowError {}

/** Something that cannot steer these images, or a setting out of range. */
export class RequestError extends PiFlowError {}

/** A network that cannot run here, or that failed. */
export class EngineError extends PiFlowError {}

/** The caller's signal was aborted. */
export class Cancelled extends PiFlowError {}
