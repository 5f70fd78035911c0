// The same rollout for mixtures of few components and many channels: substeps that never touch a channel.
//
// The state stays in the span of the vectors that gm_rollout.h fixes for each pixel,
//
//   y = start y_0 + noise e + velocity g + sum_j mix_j d_j,
//
// with y_0 that at the start. The first three coefficients depend on time alone and are worked out in double;
// a substep moves the K numbers mix_j. All it needs of the vectors are their products: d_j . d_k, and d_k
// with y_0, e and g, summed over channels once, on entry. A substep then takes some K^2 multiply-adds where
// the direct form takes 2 K C.
#pragma once

#include "gm_rollout.h"

namespace piflow {

// Coefficients of one substep:
//   w_k = softmax_2(logweight_k - logit_square |d_k|^2 / 2 + logit_start d_k . y_0 + logit_noise d_k . e
//                   + logit_velocity d_k . g + logit_mix sum_j mix_j d_j . d_k)
//   mix_k <- keep_mix mix_k + add_mix w_k
struct GramStep {
  float logit_square, logit_start, logit_noise, logit_velocity, logit_mix;
  float keep_mix, add_mix;
};

// The coefficients of y that depend on time alone; 1, 0 and 0 at the start.
struct GramSpan {
  double start, noise, velocity;
};

namespace {

// Whether this form is the faster one, from some 16 substeps on: entry costs as much as a few substeps of the
// direct form. In less than 8 channels there is little to gain. It depends on K and C alone, for the two forms
// round differently, and no result may depend on how an image is cut up.
PIFLOW_FN constexpr bool gram_is_faster(int num_components, int num_channels) {
  return padded_components(num_components) <= num_channels && num_channels >= 8;
}

// A substep, and `span` carried over it.
PIFLOW_FN GramStep gram_step(const GmCoefficients<double>& step, GramSpan* span) {
  GramStep out;
  out.logit_square = float(step.logit_square);
  out.logit_start = float(step.logit_y * span->start);
  out.logit_noise = float(step.logit_y * span->noise + step.logit_noise);
  out.logit_velocity = float(step.logit_y * span->velocity + step.logit_velocity);
  out.logit_mix = float(step.logit_y);
  out.keep_mix = float(step.keep_y);
  out.add_mix = float(step.add_mean);
  span->start = step.keep_y * span->start;
  span->noise = step.keep_y * span->noise + step.add_noise;
  span->velocity = step.keep_y * span->velocity + step.add_velocity;
  return out;
}

// A tile as gm_enter leaves it, where y stays y_0, and what the substeps need beyond it.
template <class V>
struct GramTile {
  GmTile<V> fixed;
  V* products;                  // d_j . d_k at j K + k
  V *start, *noise, *velocity;  // K: d_k . y_0, d_k . e, d_k . g
  V* mix;                       // K

  static PIFLOW_FN constexpr Index size(int K, int C) { return GmTile<V>::size(K, C) + Index(K) * (K + 4); }

  static PIFLOW_FN GramTile carve(V* memory, int K, int C) {
    GramTile tile;
    tile.fixed = GmTile<V>::carve(memory, K, C);
    tile.products = memory + GmTile<V>::size(K, C);
    tile.start = tile.products + Index(K) * K;
    tile.noise = tile.start + K;
    tile.velocity = tile.noise + K;
    tile.mix = tile.velocity + K;
    return tile;
  }
};

// out_k = d_k . vector
template <class V>
PIFLOW_FN void gram_project(const GmTile<V>& tile, const V* vector, V* out) {
  for (int k = 0; k < tile.K; k += kGroup) {
    const V* offsets = tile.offsets + tile.group(k, 0);
    V sums[kGroup];
    for (int j = 0; j < kGroup; ++j) sums[j] = V::splat(0.0f);
    for (int c = 0; c < tile.C; ++c, offsets += kGroup) {
      for (int j = 0; j < kGroup; ++j) sums[j] = fma(offsets[j], vector[c], sums[j]);
    }
    for (int j = 0; j < kGroup; ++j) out[k + j] = sums[j];
  }
}

// d_j . d_k, a pair of groups at a time; those that lie on the other side of the diagonal are copied.
template <class V>
PIFLOW_FN void gram_multiply(const GramTile<V>& tile) {
  const int K = tile.fixed.K, C = tile.fixed.C;
  for (int row = 0; row < K; row += kGroup) {
    for (int column = 0; column <= row; column += kGroup) {
      const V* left = tile.fixed.offsets + tile.fixed.group(row, 0);
      const V* right = tile.fixed.offsets + tile.fixed.group(column, 0);
      V sums[kGroup][kGroup];
      for (int i = 0; i < kGroup; ++i) {
        for (int j = 0; j < kGroup; ++j) sums[i][j] = V::splat(0.0f);
      }
      for (int c = 0; c < C; ++c, left += kGroup, right += kGroup) {
        for (int i = 0; i < kGroup; ++i) {
          for (int j = 0; j < kGroup; ++j) sums[i][j] = fma(left[i], right[j], sums[i][j]);
        }
      }
      for (int i = 0; i < kGroup; ++i) {
        for (int j = 0; j < kGroup; ++j) {
          tile.products[Index(row + i) * K + column + j] = sums[i][j];
          tile.products[Index(column + j) * K + row + i] = sums[i][j];
        }
      }
    }
  }
}

// After gm_enter. `moved`: y_0 is not 0; `floored`: there are terms in g.
template <class V>
PIFLOW_FN void gram_enter(const GramTile<V>& tile, bool moved, bool floored) {
  gram_multiply(tile);
  gram_project(tile.fixed, tile.fixed.noise, tile.noise);
  if (moved) gram_project(tile.fixed, tile.fixed.y, tile.start);
  if (floored) gram_project(tile.fixed, tile.fixed.velocity, tile.velocity);
  for (int k = 0; k < tile.fixed.K; ++k) tile.mix[k] = V::splat(0.0f);
}

// Logits of N components from k on, into `weights`; returns the largest.
template <int N, class V>
PIFLOW_FN V gram_logits(const GramTile<V>& tile, int k, const GramStep& step) {
  const int K = tile.fixed.K;
  const V square = V::splat(-step.logit_square), from_noise = V::splat(step.logit_noise);
  const V from_mix = V::splat(step.logit_mix);
  V sums[N];
  for (int i = 0; i < N; ++i) {
    const V prior = fma(square, tile.fixed.half_squares[k + i], tile.fixed.logweights[k + i]);
    sums[i] = fma(from_noise, tile.noise[k + i], prior);
  }
  if (step.logit_start != 0) {
    const V from_start = V::splat(step.logit_start);
    for (int i = 0; i < N; ++i) sums[i] = fma(from_start, tile.start[k + i], sums[i]);
  }
  if (step.logit_velocity != 0) {
    const V from_velocity = V::splat(step.logit_velocity);
    for (int i = 0; i < N; ++i) sums[i] = fma(from_velocity, tile.velocity[k + i], sums[i]);
  }
  const V* products = tile.products + k;
  for (int j = 0; j < K; ++j, products += K) {
    const V mix = from_mix * tile.mix[j];
    for (int i = 0; i < N; ++i) sums[i] = fma(mix, products[i], sums[i]);
  }
  V largest = sums[0];
  for (int i = 0; i < N; ++i) tile.fixed.weights[k + i] = sums[i];
  for (int i = 1; i < N; ++i) largest = max_or_second(sums[i], largest);
  return largest;
}

template <class V>
PIFLOW_FN void gram_substep(const GramTile<V>& tile, const GramStep& step) {
  const int K = tile.fixed.K;
  V largest = V::splat(-3.4e38f);
  int k = 0;
  for (; k + 8 <= K; k += 8) largest = max_or_second(gram_logits<8>(tile, k, step), largest);
  if (k < K) largest = max_or_second(gram_logits<4>(tile, k, step), largest);

  V totals[kGroup];
  for (int j = 0; j < kGroup; ++j) totals[j] = V::splat(0.0f);
  for (k = 0; k < K; k += kGroup) {
    for (int j = 0; j < kGroup; ++j) {
      V& weight = tile.fixed.weights[k + j];
      // Not down to the smallest float, or mix would become subnormal.
      weight = exp2_of_nonpositive(weight - largest, -64.0f);
      totals[j] = totals[j] + weight;
    }
  }
  const V keep = V::splat(step.keep_mix);
  const V share = V::splat(step.add_mix) / ((totals[0] + totals[1]) + (totals[2] + totals[3]));
  for (k = 0; k < K; ++k) tile.mix[k] = fma(share, tile.fixed.weights[k], keep * tile.mix[k]);
}

// y at the end, in the place of y_0.
template <class V>
PIFLOW_FN void gram_leave(const GramTile<V>& tile, const GramSpan& span) {
  const GmTile<V>& fixed = tile.fixed;
  const V start = V::splat(float(span.start)), noise = V::splat(float(span.noise));
  const V velocity = V::splat(float(span.velocity));
  for (int c = 0; c < fixed.C; ++c) {
    V sums[kGroup];
    for (int j = 0; j < kGroup; ++j) sums[j] = V::splat(0.0f);
    for (int k = 0; k < fixed.K; k += kGroup) {
      const V* offsets = fixed.offsets + fixed.group(k, c);
      for (int j = 0; j < kGroup; ++j) sums[j] = fma(tile.mix[k + j], offsets[j], sums[j]);
    }
    const V mean = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    fixed.y[c] = fma(start, fixed.y[c], fma(noise, fixed.noise[c], fma(velocity, fixed.velocity[c], mean)));
  }
}

}  // namespace
}  // namespace piflow
