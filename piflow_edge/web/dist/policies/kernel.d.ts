/** The rollout of Gaussian mixtures in WebAssembly: `piflow_edge/kernels`, with the rounding of its baseline on x86-64. */
/** One image's mixture: `means` (K, C, pixels) are velocities, `logweights` (K, pixels), `xSrc` (C, pixels). */
export interface Mixture {
    components: number;
    channels: number;
    pixels: number;
    means: Float32Array;
    logweights: Float32Array;
    xSrc: Float32Array;
    sigmaSrc: number;
    /** Of every component in x_0. */
    variance: number;
    eps: number;
}
export declare class Kernel {
    private readonly exports;
    private constructor();
    static open(): Promise<Kernel>;
    /** The state, (C, pixels), after Euler steps along noise levels. */
    rollout(mixture: Mixture, state: Float32Array, sigmas: Float64Array): Float32Array<ArrayBuffer>;
}
/** The kernel, which all generators share. */
export declare function openKernel(): Promise<Kernel>;
