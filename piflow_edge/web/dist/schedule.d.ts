/** Time: where the network is called, and what happens in between. The formulas are those of `piflow_edge/schedule.py`. */
/** What one network call covers: `sigmas` are the noise levels of its substeps, from the level it is called at. */
export interface Segment {
    sigmas: Float64Array;
    /** Factors of the state and of fresh noise after the last substep; null where none is added. */
    renoise: [number, number] | null;
}
/** How a segment's share of the substeps becomes a whole number; `SUBSTEP_RULES` of the Python module. */
export type SubstepRule = "round" | "ceil";
export interface ScheduleSettings {
    nfe: number;
    shift: number;
    finalStepSizeScale: number;
    totalSubsteps: number;
    h: number;
    substepRule?: SubstepRule;
}
/** Noise level at a raw time. */
export declare function warp(rawT: number, shift: number): number;
/** Raw time at a noise level. */
export declare function unwarp(sigmaT: number, shift: number): number;
/** The temperature of GM policies that the authors publish for `nfe` calls. */
export declare function publishedTemperature(nfe: number): number;
/** One segment per network call, in order. */
export declare function planSegments(settings: ScheduleSettings): Segment[];
/** The nearest whole number, and of two that are as near the even one, as NumPy rounds. */
export declare function roundHalfToEven(value: number): number;
