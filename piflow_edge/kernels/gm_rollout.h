// The arithmetic of a Gaussian-mixture rollout, for one vector of pixels; CPU and GPU kernels are loops
// around it.
//
// The formulas are those of GMPolicy.velocity, in coordinates where float32 suffices at every noise level.
// With s the policy's noise level, a pixel is described by three vectors over channels, fixed for the whole
// rollout:
//
//   velocity  g = sum_k softmax(logweights)_k means_k     velocity at the source
//   offsets   d_k = means_k - g                           so component k of x_0 is (x_src - s g) - s d_k
//   noise     e = x_src + (1 - s) g                       where the straight line along g meets sigma = 1
//
// and the state by its distance from that straight line,
//
//   y = x_t - x_src - (sigma - s) g,                      exactly 0 at the source.
//
// Posterior log-weights and the Euler step then are linear in y, e and mean_k d_k, with coefficients that
// depend on time alone. Those are worked out in double, where what cancels at low noise cancels (1/sigma^2
// against 1/s^2, and x_t against (1 - sigma) x_0); the pixels only see their sums and products.
#pragma once

#include "lanes.h"

// Before a loop over components or channels: a compiler that is to hold a tile in registers must unroll it,
// for registers have no addresses. rollout.cu says how far; on a CPU the tile lies in the L1 cache.
#if !defined(PIFLOW_UNROLL_COMPONENTS)
#define PIFLOW_UNROLL_COMPONENTS
#define PIFLOW_UNROLL_CHANNELS
#endif

namespace piflow {

// Coefficients of one Euler substep from sigma to sigma':
//   f = logit_y y + logit_noise e + logit_velocity g
//   w_k = softmax_2(logweight_k + d_k . f - logit_square |d_k|^2 / 2)
//   y <- keep_y y + add_noise e + add_velocity g + add_mean sum_k w_k d_k
// Logits are to base 2. The terms in g vanish, but where a floor of eps acts.
template <class Real>
struct GmCoefficients {
  Real logit_y, logit_noise, logit_velocity, logit_square;
  Real keep_y, add_noise, add_velocity, add_mean;
};
using GmStep = GmCoefficients<float>;

namespace {

// `variance` is that of a component in x_0, v below; eps as in GMPolicy.
PIFLOW_FN GmCoefficients<double> gm_coefficients(double sigma, double sigma_next, double sigma_src,
                                                 double variance, double eps) {
  constexpr double kLog2E = 1.4426950408889634;
  const double s = sigma_src;
  const double a = s > eps ? s : eps, b = sigma > eps ? sigma : eps;
  // What x_t says about x_0 beyond x_src: precision zeta, and nu = nu_y y + nu_e e + nu_g g once the
  // posterior is taken relative to x_src - s g.
  const double nu_y = (1 - b) / (b * b);
  const double nu_e = (a - b) / (a * b);
  const double nu_g = nu_y * (sigma - b) - (1 - a) / (a * a) * (s - a);
  const double zeta = nu_e * (1 / a + 1 / b - 2);
  const double unclipped = variance * zeta + 1;
  const double denominator = unclipped > eps ? unclipped : eps;
  // A clipped denominator leaves this share of the centre x_src - s g = e - g in the velocity; else 0.
  const double centre = 1 - unclipped / denominator;
  const double logit = -kLog2E * s / denominator;
  const double gain = variance / denominator;
  const double step = (sigma_next - sigma) / b;
  GmCoefficients<double> out;
  out.logit_y = logit * nu_y;
  out.logit_noise = logit * nu_e;
  out.logit_velocity = logit * nu_g;
  out.logit_square = -logit * s * zeta;
  out.keep_y = 1 + step * (1 - gain * nu_y);
  out.add_noise = step * (centre - gain * nu_e);
  out.add_velocity = step * (sigma - b - gain * nu_g - centre);
  out.add_mean = step * s / denominator;
  return out;
}

PIFLOW_FN GmStep rounded(const GmCoefficients<double>& exact) {
  GmStep step;
  step.logit_y = float(exact.logit_y);
  step.logit_noise = float(exact.logit_noise);
  step.logit_velocity = float(exact.logit_velocity);
  step.logit_square = float(exact.logit_square);
  step.keep_y = float(exact.keep_y);
  step.add_noise = float(exact.add_noise);
  step.add_velocity = float(exact.add_velocity);
  step.add_mean = float(exact.add_mean);
  return step;
}

PIFLOW_FN GmStep gm_step(double sigma, double sigma_next, double sigma_src, double variance, double eps) {
  return rounded(gm_coefficients(sigma, sigma_next, sigma_src, variance, eps));
}

// Components are stored in groups of four, their offsets as (group, channel, member). Sums over k run in the
// same order whatever V is, so that no result depends on how pixels are grouped.
//
// On a GPU four neighbouring threads may share a pixel: then each has one member of every group (`kHeld` is 1,
// not 4), and what runs over all members goes through `over_group`. Sums over k then are of four parts.
constexpr int kGroup = 4;

using Index = long long;  // int64_t, without the header that NVRTC does not have

PIFLOW_FN constexpr int padded_components(int num_components) {
  return (num_components + kGroup - 1) / kGroup * kGroup;
}

struct Larger {
  template <class V>
  PIFLOW_FN V operator()(V a, V b) const {
    return max_or_second(a, b);
  }
};
struct Sum {
  template <class V>
  PIFLOW_FN V operator()(V a, V b) const {
    return a + b;
  }
};

// One number of a group's four, of which kHeld are at hand: in the same order either way, for neither + nor max
// cares which of two comes first. `of_neighbour` is in rollout.cu.
template <int kHeld, class V, class F>
PIFLOW_FN V over_group(const V* parts, F f) {
  if constexpr (kHeld == kGroup) {
    return f(f(parts[0], parts[1]), f(parts[2], parts[3]));
  } else {
    const V two = f(parts[0], of_neighbour(parts[0], 1));
    return f(two, of_neighbour(two, 2));
  }
}

// Everything one vector of pixels needs during the rollout. K counts the components that are held, with the
// padding, whose weights vanish; of each group kHeld. Groups of components lie kSpread groups apart: 1, or the
// number of pixels whose groups alternate.
template <class V, int kSpread = 1, int kHeld = kGroup>
struct GmTile {
  int K, C;
  V* offsets;                              // K * C
  V *logweights, *half_squares, *weights;  // K; weights is working space
  V *velocity, *noise, *y, *slope;         // C; slope is working space, f above

  // Numbers for each pixel: those that run over components, and those that run over channels only.
  static PIFLOW_FN constexpr Index component_size(int K, int C) { return Index(K) * (C + 3); }
  static PIFLOW_FN constexpr Index channel_size(int C) { return 4 * Index(C); }
  static PIFLOW_FN constexpr Index size(int K, int C) { return component_size(K, C) + channel_size(C); }

  static PIFLOW_FN GmTile carve(V* components, V* channels, int K, int C) {
    GmTile tile;
    tile.K = K;
    tile.C = C;
    tile.offsets = components;
    tile.logweights = tile.offsets + Index(K) * C * kSpread;
    tile.half_squares = tile.logweights + Index(K) * kSpread;
    tile.weights = tile.half_squares + Index(K) * kSpread;
    tile.velocity = channels;
    tile.noise = tile.velocity + C;
    tile.y = tile.noise + C;
    tile.slope = tile.y + C;
    return tile;
  }
  static PIFLOW_FN GmTile carve(V* memory, int K, int C) {
    return carve(memory, memory + component_size(K, C), K, C);
  }

  // Where a group's first member stands, and a component, among the K numbers of one kind.
  static PIFLOW_FN Index group(int k) { return Index(k) * kSpread; }
  static PIFLOW_FN Index at(int k) { return group(k / kHeld * kHeld) + k % kHeld; }
  PIFLOW_FN Index group(int k, int c) const { return (Index(k) * C + Index(c) * kHeld) * kSpread; }
  PIFLOW_FN V& offset(int k, int c) const { return offsets[group(k / kHeld * kHeld, c) + k % kHeld]; }
};

// sum_k weights_k offsets_kc for N channels from c on. The first call (`kFresh`) finds base-2 logits in
// `weights`, makes weights of them on the way, which the others use, and tells their sum.
template <int N, bool kFresh, class V, int kSpread, int kHeld>
PIFLOW_FN void gm_weigh(GmTile<V, kSpread, kHeld> tile, int c, V largest, V* sums, V* total) {
  V totals[kHeld];
  for (int j = 0; j < kHeld; ++j) totals[j] = V::splat(0.0f);
  for (int i = 0; i < N; ++i) sums[i] = V::splat(0.0f);
  PIFLOW_UNROLL_COMPONENTS
  for (int k = 0; k < tile.K; k += kHeld) {
    const V* offsets = tile.offsets + tile.group(k, c);
    V* weights = tile.weights + tile.group(k);
    for (int j = 0; j < kHeld; ++j) {
      V w = weights[j];
      if (kFresh) {
        w = exp2_of_nonpositive(w - largest);
        weights[j] = w;
        totals[j] = totals[j] + w;
      }
      for (int i = 0; i < N; ++i) sums[i] = fma(w, offsets[i * kHeld * kSpread + j], sums[i]);
    }
  }
  if (kFresh) *total = over_group<kHeld>(totals, Sum());
  if constexpr (kHeld < kGroup) {
    for (int i = 0; i < N; ++i) sums[i] = over_group<kHeld>(sums + i, Sum());
  }
}

// f(c, mean) for each channel from c on, in blocks of up to N whose sums fit the registers.
template <int N, class V, int kSpread, int kHeld, class F>
PIFLOW_FN void gm_mean_blocks(GmTile<V, kSpread, kHeld> tile, int c, bool fresh, V largest, V total, F f) {
  if constexpr (N > 0) {
    PIFLOW_UNROLL_CHANNELS
    for (; c + N <= tile.C; c += N, fresh = false) {
      V sums[N];
      if (fresh) {
        gm_weigh<N, true>(tile, c, largest, sums, &total);
      } else {
        gm_weigh<N, false>(tile, c, largest, sums, &total);
      }
      const V share = V::splat(1.0f) / total;
      for (int i = 0; i < N; ++i) f(c + i, sums[i] * share);
    }
    gm_mean_blocks<N / 2>(tile, c, fresh, largest, total, f);
  }
}

// f(c, mean) for each channel, with mean = sum_k softmax_2(weights)_k offsets_kc; on entry `weights` are
// base-2 logits, on return used up. `largest` is the greatest of them.
template <class V, int kSpread, int kHeld, class F>
PIFLOW_FN void gm_for_each_mean(GmTile<V, kSpread, kHeld> tile, V largest, F f) {
  // Exponentials run between the sums of the first channels, so that neither waits for the other; but ahead
  // of them where registers are too few for both.
  constexpr bool kTogether = V::registers >= 32;
  V total = V::splat(1.0f);
  if constexpr (!kTogether) gm_weigh<0, true, V>(tile, 0, largest, nullptr, &total);
  gm_mean_blocks<8>(tile, 0, kTogether, largest, total, f);
}

template <class V, int kSpread, int kHeld>
PIFLOW_FN V gm_largest_logweight(GmTile<V, kSpread, kHeld> tile) {
  V largest = tile.logweights[0];
  PIFLOW_UNROLL_COMPONENTS
  for (int k = 1; k < tile.K; ++k) largest = max_or_second(largest, tile.logweights[tile.at(k)]);
  if constexpr (kHeld < kGroup) largest = over_group<kHeld>(&largest, Larger());
  return largest;
}

// Source point -> fixed vectors, and y at the start. On entry the tile holds `means` in offsets, natural
// log-weights in logweights (padding: 0 and -inf), x_src in noise, and x_start - x_src in y.
template <class V, int kSpread, int kHeld>
PIFLOW_FN void gm_enter(GmTile<V, kSpread, kHeld> tile, double sigma_src, double sigma_start) {
  const V largest = gm_largest_logweight(tile);
  PIFLOW_UNROLL_COMPONENTS
  for (int k = 0; k < tile.K; ++k) {
    const Index i = tile.at(k);
    tile.logweights[i] = (tile.logweights[i] - largest) * V::splat(1.44269504f);
    tile.weights[i] = tile.logweights[i];
    tile.half_squares[i] = V::splat(0.0f);
  }
  gm_for_each_mean(tile, V::splat(0.0f), [=](int c, V mean) { tile.velocity[c] = mean; });

  const V alpha_src = V::splat(float(1 - sigma_src)), ahead = V::splat(float(sigma_src - sigma_start));
  PIFLOW_UNROLL_CHANNELS
  for (int c = 0; c < tile.C; ++c) {
    const V g = tile.velocity[c];
    tile.noise[c] = fma(alpha_src, g, tile.noise[c]);
    tile.y[c] = fma(ahead, g, tile.y[c]);
  }
  PIFLOW_UNROLL_COMPONENTS
  for (int k = 0; k < tile.K; k += kHeld) {
    V* half_squares = tile.half_squares + tile.group(k);
    PIFLOW_UNROLL_CHANNELS
    for (int c = 0; c < tile.C; ++c) {
      for (int j = 0; j < kHeld; ++j) {
        V& d = tile.offsets[tile.group(k, c) + j];
        d = d - tile.velocity[c];
        half_squares[j] = fma(d * V::splat(0.5f), d, half_squares[j]);
      }
    }
  }
}

template <class V, int kSpread, int kHeld>
PIFLOW_FN void gm_substep(GmTile<V, kSpread, kHeld> tile, const GmStep& step) {
  const bool floored = step.logit_velocity != 0 || step.add_velocity != 0;
  {
    const V from_y = V::splat(step.logit_y), from_noise = V::splat(step.logit_noise);
    PIFLOW_UNROLL_CHANNELS
    for (int c = 0; c < tile.C; ++c) tile.slope[c] = fma(from_y, tile.y[c], from_noise * tile.noise[c]);
  }
  if (floored) {
    const V from_velocity = V::splat(step.logit_velocity);
    PIFLOW_UNROLL_CHANNELS
    for (int c = 0; c < tile.C; ++c) tile.slope[c] = fma(from_velocity, tile.velocity[c], tile.slope[c]);
  }

  const V square = V::splat(-step.logit_square);
  V largest[kHeld];
  for (int j = 0; j < kHeld; ++j) largest[j] = V::splat(-3.4e38f);
  PIFLOW_UNROLL_COMPONENTS
  for (int k = 0; k < tile.K; k += kHeld) {
    V logits[kHeld];
    const Index group = tile.group(k);
    for (int j = 0; j < kHeld; ++j) {
      logits[j] = fma(square, tile.half_squares[group + j], tile.logweights[group + j]);
    }
    const V* offsets = tile.offsets + tile.group(k, 0);
    PIFLOW_UNROLL_CHANNELS
    for (int c = 0; c < tile.C; ++c, offsets += kHeld * kSpread) {
      const V f = tile.slope[c];
      for (int j = 0; j < kHeld; ++j) logits[j] = fma(offsets[j], f, logits[j]);
    }
    for (int j = 0; j < kHeld; ++j) {
      tile.weights[group + j] = logits[j];
      largest[j] = max_or_second(logits[j], largest[j]);
    }
  }
  const V largest_of_all = over_group<kHeld>(largest, Larger());

  const V keep = V::splat(step.keep_y), add_noise = V::splat(step.add_noise);
  const V add_mean = V::splat(step.add_mean);
  gm_for_each_mean(tile, largest_of_all, [=](int c, V mean) {
    tile.y[c] = fma(add_mean, mean, fma(keep, tile.y[c], add_noise * tile.noise[c]));
  });
  if (floored) {
    const V add_velocity = V::splat(step.add_velocity);
    PIFLOW_UNROLL_CHANNELS
    for (int c = 0; c < tile.C; ++c) tile.y[c] = fma(add_velocity, tile.velocity[c], tile.y[c]);
  }
}

// The state at sigma_dst, once the substeps are done: x_src + (sigma_dst - s) g + y.
template <class V, int kSpread, int kHeld>
PIFLOW_FN V gm_leave(GmTile<V, kSpread, kHeld> tile, int c, V x_src, double sigma_src, double sigma_dst) {
  return x_src + fma(V::splat(float(sigma_dst - sigma_src)), tile.velocity[c], tile.y[c]);
}

}  // namespace
}  // namespace piflow
