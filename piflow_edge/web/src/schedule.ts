/** Time: where the network is called, and what happens in between. The formulas are those of `piflow_edge/schedule.py`. */

import { RequestError } from "./errors.js";

const RENOISE_EPS = 1e-6;
const WHOLE = 1e-6;

/** What one network call covers: `sigmas` are the noise levels of its substeps, from the level it is called at. */
export interface Segment {
  sigmas: Float64Array;
  /** Factors of the state and of fresh noise after the last substep; null where none is added. */
  renoise: [number, number] | null;
}

/** How a segment's share of the substeps becomes a whole number; `SUBSTEP_RULES` of the Python module. */
export type SubstepRule = "round" | "ceil";

const SUBSTEP_RULES: Record<SubstepRule, (count: number) => number> = {
  round: roundHalfToEven,
  ceil: (count) => Math.ceil(count - WHOLE), // a whole number stays, whatever warp and unwarp rounded
};

export interface ScheduleSettings {
  nfe: number;
  shift: number;
  finalStepSizeScale: number;
  totalSubsteps: number;
  h: number;
  substepRule?: SubstepRule;
}

/** Noise level at a raw time. */
export function warp(rawT: number, shift: number): number {
  return (shift * rawT) / (1 + (shift - 1) * rawT);
}

/** Raw time at a noise level. */
export function unwarp(sigmaT: number, shift: number): number {
  return sigmaT / (shift + (1 - shift) * sigmaT);
}

/** The temperature of GM policies that the authors publish for `nfe` calls. */
export function publishedTemperature(nfe: number): number {
  return Math.min(0.1 * (nfe - 1), 1);
}

/** One segment per network call, in order. */
export function planSegments(settings: ScheduleSettings): Segment[] {
  const { nfe, shift, finalStepSizeScale, totalSubsteps, h } = settings;
  const countOf = SUBSTEP_RULES[settings.substepRule ?? "round"];
  checkWhole("nfe", nfe);
  checkWhole("substeps", totalSubsteps);
  if (!(h >= 0)) throw new RequestError(`h is a number, 0 or more, or Infinity; got ${h}`);
  const base = 1 / (nfe - 1 + finalStepSizeScale);
  const levels = Array.from({ length: nfe }, (_, i) => warp(Math.max(1 - i * base, 0), shift));
  levels.push(0);
  const count = (rawTime: number) => Math.max(countOf(totalSubsteps * rawTime), 1);
  return levels.slice(0, -1).map((src, i) => planSegment(src, levels[i + 1], shift, count, h));
}

function planSegment(
  src: number,
  next: number,
  shift: number,
  count: (rawTime: number) => number,
  h: number,
): Segment {
  let m = 1;
  let dst = next;
  if (h > 0) {
    const ratio = (next * (1 - src)) / Math.max(src * (1 - next), RENOISE_EPS);
    m = h === Infinity ? 0 : ratio ** (h * h);
    dst = (next * m) / Math.max(1 - next + next * m, RENOISE_EPS);
  }
  const start = unwarp(src, shift);
  const end = unwarp(dst, shift);
  const substeps = count(start - end);
  const sigmas = Float64Array.from({ length: substeps + 1 }, (_, i) =>
    warp(Math.max(start + (end - start) * (i / substeps), 0), shift),
  );
  sigmas[0] = src; // exactly, whatever warp and unwarp rounded
  sigmas[substeps] = dst;
  const renoises = m < 1 && next > 0;
  return { sigmas, renoise: renoises ? [1 - next + next * m, next * Math.sqrt(Math.max(1 - m * m, 0))] : null };
}

/** The nearest whole number, and of two that are as near the even one, as NumPy rounds. */
export function roundHalfToEven(value: number): number {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return rest < 0.5 ? floor : floor + 1;
  return floor % 2 === 0 ? floor : floor + 1;
}

function checkWhole(name: string, value: number): void {
  if (!Number.isInteger(value) || value < 1) {
    throw new RequestError(`${name} is a whole number, 1 or more; got ${value}`);
  }
}
