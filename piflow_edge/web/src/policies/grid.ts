/**
 * Policy "dx": x_0 as a grid over the segment or a polynomial in raw time, so that any number of Euler steps is one
 * weighted sum. The formulas are those of `piflow_edge/policies/dx.py`.
 */

import { unwarp } from "../schedule.js";
import type { Outputs, Policy, PolicyKind, StateSize } from "./policy.js";

export interface GridSettings {
  numNodes: number;
  segmentSize: number;
  shift: number;
  mode: "grid" | "polynomial";
  eps: number;
}

class GridPolicy implements Policy {
  constructor(
    private readonly grid: Float32Array,
    private readonly xSrc: Float32Array,
    private readonly size: StateSize,
    private readonly sigmaSrc: number,
    private readonly settings: GridSettings,
  ) {}

  integrate(state: Float32Array, sigmas: Float64Array): Float32Array {
    const { start, source, nodes } = computeWeights(sigmas, this.sigmaSrc, this.settings);
    const values = this.size.channels * this.size.pixels;
    const end = new Float32Array(state.length);
    for (let b = 0; b < this.size.batch; b++) {
      for (let i = 0; i < values; i++) {
        const at = b * values + i;
        let sum = start * state[at] + source * this.xSrc[at];
        for (let n = 0; n < nodes.length; n++) sum += nodes[n] * this.grid[(b * nodes.length + n) * values + i];
        end[at] = sum;
      }
    }
    return end;
  }
}

/** The weights of the state, of the source and of the nodes in the end of a rollout. */
function computeWeights(sigmas: Float64Array, sigmaSrc: number, settings: GridSettings) {
  const nodes = new Float64Array(settings.numNodes);
  let left = 1; // what is left of a state after the steps from here on
  let source = 0;
  for (let i = sigmas.length - 2; i >= 0; i--) {
    const towards = (sigmas[i] - sigmas[i + 1]) / Math.max(sigmas[i], settings.eps);
    const basis = computeBasis(sigmas[i], sigmaSrc, settings);
    for (let n = 0; n < nodes.length; n++) {
      nodes[n] -= sigmaSrc * towards * left * basis[n];
      source += towards * left * basis[n]; // x_0 = x_src - sigma_src * grid
    }
    left *= 1 - towards;
  }
  return { start: left, source, nodes };
}

/** The weights of the nodes in x_0 at a noise level. */
function computeBasis(sigma: number, sigmaSrc: number, settings: GridSettings): number[] {
  const { numNodes, segmentSize, shift, mode, eps } = settings;
  const src = unwarp(sigmaSrc, shift);
  const rawT = unwarp(sigma, shift);
  const numbers = Array.from({ length: numNodes }, (_, n) => n);
  if (mode === "polynomial") return numbers.map((n) => (src - rawT) ** n);
  const dst = Math.max(src - segmentSize, 0);
  const share = (rawT - dst) / Math.max(src - dst, eps);
  const position = Math.min(Math.max(share, 0), 1) * (numNodes - 1);
  return numbers.map((n) => Math.max(1 - Math.abs(position - n), 0)); // hat functions: linear interpolation
}

export function gridKind(settings: GridSettings): PolicyKind {
  return {
    outputs: ["grid"],
    open(outputs: Outputs, xSrc, size, sigmaSrc) {
      return new GridPolicy(outputs.grid, xSrc, size, sigmaSrc, settings);
    },
  };
}
