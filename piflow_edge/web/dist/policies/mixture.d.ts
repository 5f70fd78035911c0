/**
 * Policies "gm" and "gmk": a Gaussian mixture at every position, carried to other states and noise levels by Bayes'
 * rule. The formulas are those of `piflow_edge/policies/gm.py` and `gmk.py`, worked out in float64.
 */
import type { PolicyKind } from "./policy.js";
/** A kind of mixture. `hasOneVariance`: all components of an image share one. */
export declare function mixtureKind(eps: number, components: number, hasOneVariance: boolean): PolicyKind;
