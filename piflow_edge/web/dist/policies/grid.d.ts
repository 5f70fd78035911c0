/**
 * Policy "dx": x_0 as a grid over the segment or a polynomial in raw time, so that any number of Euler steps is one
 * weighted sum. The formulas are those of `piflow_edge/policies/dx.py`.
 */
import type { PolicyKind } from "./policy.js";
export interface GridSettings {
    numNodes: number;
    segmentSize: number;
    shift: number;
    mode: "grid" | "polynomial";
    eps: number;
}
export declare function gridKind(settings: GridSettings): PolicyKind;
