/** How a state is carried along a policy: the steps it was trained with, or fewer. As `piflow_edge/integrator.py` does it. */

import { RequestError } from "../errors.js";
import { roundHalfToEven } from "../schedule.js";
import type { Policy } from "./policy.js";

export type Solver = "euler" | "multistep";

type Carry = (policy: Policy, state: Float32Array, sigmas: Float64Array) => Float32Array;

const SOLVERS: Record<Solver, Carry> = {
  euler: (policy, state, sigmas) => policy.integrate(state, sigmas),
  multistep: takeMultisteps,
};

/** What carries a state along noise levels, by its name. */
export function readSolver(name: Solver): Carry {
  if (!Object.hasOwn(SOLVERS, name)) {
    throw new RequestError(`solver is one of ${Object.keys(SOLVERS).join(", ")}; got ${name}`);
  }
  return SOLVERS[name];
}

/**
 * About the state where Euler steps along `sigmas` lead, with a quarter of the evaluations: x_0 is known where the policy
 * is asked, and in between follows the line through the last two answers.
 */
function takeMultisteps(policy: Policy, state: Float32Array, sigmas: Float64Array): Float32Array {
  let last: Float32Array | undefined;
  let sigmaLast = 1;
  const levels = planEvaluations(sigmas);
  for (let e = 0; e < levels.length - 1; e++) {
    const sigma = sigmas[levels[e]];
    const remaining = sigmas[levels[e + 1]] / sigma; // what is left of the state after all Euler steps up to there
    const x0 = policy.integrate(state, Float64Array.of(sigma, 0)); // the Euler step down to 0 ends there
    const before = last;
    const slope = before ? weighSlope(sigmas.subarray(levels[e], levels[e + 1] + 1)) / (sigma - sigmaLast) : 0;
    state = state.map((x, i) => remaining * x + (1 - remaining) * x0[i] + slope * (x0[i] - (before ?? x0)[i]));
    [last, sigmaLast] = [x0, sigma];
  }
  return state;
}

/** What Euler steps along `sigmas` from x = 0 make of x_0 = sigma - sigmas[0]. */
function weighSlope(sigmas: Float64Array): number {
  let x = 0;
  for (let i = 0; i < sigmas.length - 1; i++) {
    x = (sigmas[i + 1] * x + (sigmas[i] - sigmas[i + 1]) * (sigmas[i] - sigmas[0])) / sigmas[i];
  }
  return x;
}

/** The levels, by their index, at which the policy is asked, and the last: the first two, then even in the root of sigma. */
export function planEvaluations(sigmas: Float64Array): number[] {
  const substeps = sigmas.length - 1;
  const count = Math.ceil(substeps / 4);
  const [first, end] = [Math.sqrt(sigmas[1]), Math.sqrt(sigmas[substeps])];
  const indices: number[] = [];
  for (let i = 0; i < count; i++) {
    // In NumPy's order of operations, for whole numbers are made of it.
    const root = i < count - 1 || !i ? first + i * ((end - first) / (count - 1 || 1)) : end;
    const nearest = roundHalfToEven(findIndex(sigmas, root * root));
    // No two the same: each at least one after the one before, and early enough to leave room for the rest.
    indices.push(i ? Math.max(nearest, indices[i - 1] + 1) : nearest);
  }
  return [0, ...indices.map((index, i) => (i === count - 1 ? substeps : Math.min(index, substeps - (count - 1 - i))))];
}

/** Where a level lies among falling ones, as an index with a fraction; as NumPy interpolates. */
function findIndex(sigmas: Float64Array, sigma: number): number {
  const after = sigmas.findIndex((level) => level < sigma);
  if (after < 1) return after < 0 ? sigmas.length - 1 : 0;
  const slope = 1 / (sigmas[after - 1] - sigmas[after]);
  return slope * (sigmas[after - 1] - sigma) + (after - 1);
}
