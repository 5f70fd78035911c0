/** What a policy is: one network output as a velocity field that holds for a whole segment. */
/** Outputs of the student by name, float32 in the shapes that the bundle says. */
export type Outputs = Record<string, Float32Array>;
/** How large a batch of states is: `pixels` is height times width. */
export interface StateSize {
    batch: number;
    channels: number;
    pixels: number;
}
export interface Policy {
    /** The state after Euler steps along noise levels; `state` is left as it was. */
    integrate(state: Float32Array, sigmas: Float64Array): Float32Array;
}
/** One kind of policy, as `bundle.json` describes it. */
export interface PolicyKind {
    /** Names of the outputs that it reads. */
    outputs: readonly string[];
    /** The policy that outputs at `xSrc` and noise level `sigmaSrc` stand for, sharpened by a temperature up to 1. */
    open(outputs: Outputs, xSrc: Float32Array, size: StateSize, sigmaSrc: number, temperature: number): Policy;
}
