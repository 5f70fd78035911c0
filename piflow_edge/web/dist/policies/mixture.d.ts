/**
 * Policies "gm" and "gmk": a Gaussian mixture at every position, carried to other states and noise levels by Bayes'
 * rule. Where all components share a variance, the compiled kernel does it; else the formulas of
 * `piflow_edge/policies/gmk.py`, worked out here in float64.
 */
import type { Kernel } from "./kernel.js";
import type { PolicyKind } from "./policy.js";
/** The kind "gm", whose components share a variance. */
export declare function sharedMixtureKind(kernel: Kernel, components: number, eps: number): PolicyKind;
/** The kind "gmk", whose components have a variance each. */
export declare function mixtureKind(components: number, eps: number): PolicyKind;
