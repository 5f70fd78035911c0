/** How a state is carried along a policy: the steps it was trained with, or fewer. As `piflow_edge/integrator.py` does it. */
import type { Policy } from "./policy.js";
export type Solver = "euler" | "multistep";
type Carry = (policy: Policy, state: Float32Array, sigmas: Float64Array) => Float32Array;
/** What carries a state along noise levels, by its name. */
export declare function readSolver(name: Solver): Carry;
/** The levels, by their index, at which the policy is asked, and the last: the first two, then even in the root of sigma. */
export declare function planEvaluations(sigmas: Float64Array): number[];
export {};
