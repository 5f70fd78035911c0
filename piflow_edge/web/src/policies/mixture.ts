/**
 * Policies "gm" and "gmk": a Gaussian mixture at every position, carried to other states and noise levels by Bayes'
 * rule. The formulas are those of `piflow_edge/policies/gm.py` and `gmk.py`, worked out in float64.
 */

import type { Outputs, Policy, PolicyKind, StateSize } from "./policy.js";

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

const NOTHING = new Float64Array();

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

/** A kind of mixture. `hasOneVariance`: all components of an image share one. */
export function mixtureKind(eps: number, components: number, hasOneVariance: boolean): PolicyKind {
  return {
    outputs: ["means", "logweights", "logstds"],
    open(outputs: Outputs, xSrc, size, sigmaSrc, temperature) {
      const sharpness = Math.min(Math.max(temperature, eps), 1);
      const logweights = Float64Array.from(outputs.logweights, (value) => value / sharpness);
      const perImage = hasOneVariance ? 1 : components;
      const variances = Float64Array.from({ length: size.batch * components }, (_, i) => {
        const b = Math.floor(i / components);
        const logstd = outputs.logstds[b * perImage + (hasOneVariance ? 0 : i % components)];
        return Math.exp(2 * logstd) * sigmaSrc ** 2 * sharpness;
      });
      return new MixturePolicy(outputs.means, logweights, variances, xSrc, size, sigmaSrc, eps);
    },
  };
}
