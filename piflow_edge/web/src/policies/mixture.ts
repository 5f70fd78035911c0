/**
 * Policies "gm" and "gmk": a Gaussian mixture at every position, carried to other states and noise levels by Bayes'
 * rule. Where all components share a variance, the compiled kernel does it; else the formulas of
 * `piflow_edge/policies/gmk.py`, worked out here in float64.
 */

import type { Kernel } from "./kernel.js";
import type { Outputs, Policy, PolicyKind, StateSize } from "./policy.js";

const NOTHING = new Float64Array();
/** A component so far below the likeliest one, in logarithms, changes no digit of a sum in float64. */
const NEGLIGIBLE = -40;

/** What a substep needs to know of its noise level, for one variance. `step`: of an Euler step, by the noise level. */
interface SubstepTime {
  step: number;
  zeta: number;
  ofState: number;
  ofSource: number;
}

class MixturePolicy implements Policy {
  /** `variances`: of the components in x_0, (B, K). `logweights`: (B, K, pixels). `means`: velocities (B, K, C, pixels). */
  constructor(
    private readonly means: Float32Array,
    private readonly logweights: Float64Array,
    private readonly variances: Float64Array,
    private readonly xSrc: Float32Array,
    private readonly size: StateSize,
    private readonly sigmaSrc: number,
    private readonly eps: number,
  ) {}

  integrate(state: Float32Array, sigmas: Float64Array): Float32Array {
    const { batch, channels, pixels } = this.size;
    const components = this.variances.length / batch;
    const times = planSubsteps(sigmas, this.sigmaSrc, this.eps);
    const end = new Float32Array(state.length);
    const pixel = new MixturePixel(components, channels);
    for (let b = 0; b < batch; b++) {
      const variances = this.variances.subarray(b * components, (b + 1) * components);
      pixel.setTerms(computeTerms(variances, times, channels, this.eps));
      for (let p = 0; p < pixels; p++) {
        for (let c = 0; c < channels; c++) {
          const at = (b * channels + c) * pixels + p;
          pixel.x[c] = state[at];
          pixel.xSrc[c] = this.xSrc[at];
        }
        for (let k = 0; k < components; k++) {
          pixel.logweights[k] = this.logweights[(b * components + k) * pixels + p];
          for (let c = 0; c < channels; c++) {
            const u = this.means[((b * components + k) * channels + c) * pixels + p];
            pixel.x0Means[k * channels + c] = pixel.xSrc[c] - this.sigmaSrc * u;
          }
        }
        pixel.integrate(times);
        for (let c = 0; c < channels; c++) end[(b * channels + c) * pixels + p] = pixel.x[c];
      }
    }
    return end;
  }
}

/** The mixture at one position, and its state. What depends on time alone is worked out once for all positions. */
class MixturePixel {
  readonly x: Float64Array;
  readonly xSrc: Float64Array;
  readonly x0Means: Float64Array;
  readonly logweights: Float64Array;
  private readonly nu: Float64Array;
  private readonly sums: Float64Array;
  private readonly weights: Float64Array;
  private readonly halfSquares: Float64Array;
  private terms: ComponentTerms = { variances: NOTHING, precisions: NOTHING, excesses: NOTHING, volumes: NOTHING };

  constructor(
    private readonly components: number,
    private readonly channels: number,
  ) {
    this.x = new Float64Array(channels);
    this.xSrc = new Float64Array(channels);
    this.nu = new Float64Array(channels);
    this.sums = new Float64Array(channels);
    this.x0Means = new Float64Array(components * channels);
    this.logweights = new Float64Array(components);
    this.weights = new Float64Array(components);
    this.halfSquares = new Float64Array(components);
  }

  setTerms(terms: ComponentTerms): void {
    this.terms = terms;
  }

  integrate(times: SubstepTime[]): void {
    const { x, xSrc, nu, sums, x0Means, weights, components, channels } = this;
    const { variances, precisions } = this.terms;
    this.computeHalfSquares();
    for (let i = 0; i < times.length; i++) {
      const { ofState, ofSource, step, zeta } = times[i];
      for (let c = 0; c < channels; c++) {
        nu[c] = ofState * x[c] - ofSource * xSrc[c];
        sums[c] = 0;
      }
      this.weigh(i, zeta);
      // x_0 is the mean of (mean_k + variance_k nu) precision_k, each by its weight.
      let total = 0;
      let ofNu = 0;
      for (let k = 0; k < components; k++) {
        total += weights[k];
        const weight = weights[k] * precisions[i * components + k];
        ofNu += weight * variances[k];
        for (let c = 0; c < channels; c++) sums[c] += weight * x0Means[k * channels + c];
      }
      for (let c = 0; c < channels; c++) x[c] += (x[c] - (sums[c] + ofNu * nu[c]) / total) * step;
    }
  }

  /** The posterior weights of the components at the i-th substep, the largest of which is 1. */
  private weigh(i: number, zeta: number): void {
    const { components, channels, nu, weights, x0Means, logweights, halfSquares } = this;
    const { precisions, excesses, volumes } = this.terms;
    let halfSquare = 0;
    for (let c = 0; c < channels; c++) halfSquare += 0.5 * nu[c] * nu[c];
    let largest = -Infinity;
    for (let k = 0; k < components; k++) {
      const at = i * components + k;
      let evidence = excesses[at] * halfSquare - zeta * halfSquares[k];
      for (let c = 0; c < channels; c++) evidence += x0Means[k * channels + c] * nu[c];
      weights[k] = logweights[k] + evidence * precisions[at] - volumes[at];
      if (weights[k] > largest) largest = weights[k];
    }
    for (let k = 0; k < components; k++) {
      const below = weights[k] - largest;
      weights[k] = below < NEGLIGIBLE ? 0 : Math.exp(below);
    }
  }

  private computeHalfSquares(): void {
    const { halfSquares, x0Means, channels } = this;
    for (let k = 0; k < halfSquares.length; k++) {
      halfSquares[k] = 0;
      for (let c = 0; c < channels; c++) halfSquares[k] += 0.5 * x0Means[k * channels + c] ** 2;
    }
  }
}

/** What the variances of one image's components make of each substep, (substeps, K). */
interface ComponentTerms {
  variances: Float64Array;
  precisions: Float64Array;
  excesses: Float64Array;
  volumes: Float64Array;
}

/** Where all variances are alike, excesses are 0, and volumes the same for all, so that they change no weight. */
function computeTerms(variances: Float64Array, times: SubstepTime[], channels: number, eps: number): ComponentTerms {
  const size = times.length * variances.length;
  const terms = {
    variances,
    precisions: new Float64Array(size),
    excesses: new Float64Array(size),
    volumes: new Float64Array(size),
  };
  const widest = Math.max(...variances);
  times.forEach(({ zeta }, i) => {
    variances.forEach((variance, k) => {
      const at = i * variances.length + k;
      const denominator = Math.max(variance * zeta + 1, eps);
      terms.precisions[at] = 1 / denominator;
      terms.excesses[at] = (variance - widest) / Math.max(widest * zeta + 1, eps);
      terms.volumes[at] = Math.log(denominator) * 0.5 * channels;
    });
  });
  return terms;
}

/** What the state says about x_0 beyond what the source said: exactly nothing at the source itself. */
function planSubsteps(sigmas: Float64Array, sigmaSrc: number, eps: number): SubstepTime[] {
  const source = Math.max(sigmaSrc, eps);
  return Array.from(sigmas.subarray(0, -1), (sigma, i) => {
    const floor = Math.max(sigma, eps);
    return {
      step: (sigmas[i + 1] - sigma) / floor,
      zeta: ((1 - floor) / floor) ** 2 - ((1 - source) / source) ** 2,
      ofState: (1 - floor) / floor ** 2,
      ofSource: (1 - source) / source ** 2,
    };
  });
}

/** Mixtures whose components share a variance, carried by the compiled kernel. */
class CompiledPolicy implements Policy {
  constructor(
    private readonly kernel: Kernel,
    private readonly outputs: Outputs,
    private readonly xSrc: Float32Array,
    private readonly size: StateSize,
    private readonly sigmaSrc: number,
    private readonly sharpness: number,
    private readonly components: number,
    private readonly eps: number,
  ) {}

  integrate(state: Float32Array, sigmas: Float64Array): Float32Array {
    const { batch, channels, pixels } = this.size;
    const { components, sigmaSrc, sharpness, eps } = this;
    const of = (array: Float32Array, b: number) => {
      const size = array.length / batch;
      return array.subarray(b * size, (b + 1) * size);
    };
    const end = new Float32Array(state.length);
    for (let b = 0; b < batch; b++) {
      const xSrc = of(this.xSrc, b);
      const logweights = of(this.outputs.logweights, b);
      const mixture = {
        ...{ components, channels, pixels, sigmaSrc, eps, xSrc },
        means: of(this.outputs.means, b),
        logweights: sharpness === 1 ? logweights : logweights.map((value) => value / sharpness),
        variance: Math.exp(2 * this.outputs.logstds[b]) * sigmaSrc ** 2 * sharpness,
      };
      end.set(this.kernel.rollout(mixture, state === this.xSrc ? xSrc : of(state, b), sigmas), b * channels * pixels);
    }
    return end;
  }
}

const OUTPUTS = ["means", "logweights", "logstds"];

function clip(temperature: number, eps: number): number {
  return Math.min(Math.max(temperature, eps), 1);
}

/** The kind "gm", whose components share a variance. */
export function sharedMixtureKind(kernel: Kernel, components: number, eps: number): PolicyKind {
  return {
    outputs: OUTPUTS,
    open(outputs: Outputs, xSrc, size, sigmaSrc, temperature) {
      return new CompiledPolicy(kernel, outputs, xSrc, size, sigmaSrc, clip(temperature, eps), components, eps);
    },
  };
}

/** The kind "gmk", whose components have a variance each. */
export function mixtureKind(components: number, eps: number): PolicyKind {
  return {
    outputs: OUTPUTS,
    open(outputs: Outputs, xSrc, size, sigmaSrc, temperature) {
      const sharpness = clip(temperature, eps);
      const logweights = Float64Array.from(outputs.logweights, (value) => value / sharpness);
      const variances = Float64Array.from(
        outputs.logstds.subarray(0, size.batch * components),
        (logstd) => Math.exp(2 * logstd) * sigmaSrc ** 2 * sharpness,
      );
      return new MixturePolicy(outputs.means, logweights, variances, xSrc, size, sigmaSrc, eps);
    },
  };
}
