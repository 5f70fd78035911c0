// The loops over pixels, compiled once per instruction set: the build passes PIFLOW_ISA, its name, and the
// flags. One object file per set, not target attributes on functions: flags reach the intrinsics and every
// inlined helper alike, in gcc, clang and others. Nothing of the C++ library is used here, for the linker
// would share its inline functions between the sets, and could keep one that this processor cannot run.
#include "isa.h"

namespace piflow {
namespace {

// Up to a register of numbers from a row; zeros where the image ends.
Lanes load_some(const float* row, int64_t valid) {
  if (valid >= Lanes::width) return Lanes::load(row);
  float padded[Lanes::width] = {};
  memcpy(padded, row, size_t(valid) * sizeof(float));
  return Lanes::load(padded);
}

void store_some(Lanes value, float* row, int64_t valid) {
  if (valid >= Lanes::width) return value.store(row);
  float padded[Lanes::width];
  value.store(padded);
  memcpy(row, padded, size_t(valid) * sizeof(float));
}

// One register of pixels. With K C = 128 numbers for each, the tile fills 4 (baseline) to 16 KiB (AVX-512) of
// the L1 cache. A second register at once was measured slower or no faster everywhere: it spills.
void gm_tile(const piflow_gm& problem, const GmSchedule& schedule, int64_t sample, int64_t first,
             Lanes* memory) {
  const int K = int(problem.num_components), C = int(problem.num_channels);
  const int64_t pixels = problem.pixels, valid = pixels - first;
  GmTile<Lanes> tile = GmTile<Lanes>::carve(memory, padded_components(K), C);

  const float* means = problem.means + sample * K * C * pixels + first;
  const float* logweights = problem.logweights + sample * K * pixels + first;
  for (int k = 0; k < tile.K; ++k) {
    const bool padding = k >= K;
    tile.logweights[k] = padding ? Lanes::splat(-HUGE_VALF) : load_some(logweights + k * pixels, valid);
    for (int c = 0; c < C; ++c) {
      tile.offset(k, c) =
          padding ? Lanes::splat(0.0f) : load_some(means + (int64_t(k) * C + c) * pixels, valid);
    }
  }
  const int64_t state = sample * C * pixels + first;
  for (int c = 0; c < C; ++c) {
    tile.noise[c] = load_some(problem.x_src + state + c * pixels, valid);
    tile.y[c] = load_some(problem.x_start + state + c * pixels, valid) - tile.noise[c];
  }

  const double sigma_src = problem.sigma_src[sample];
  gm_enter(tile, sigma_src, schedule.sigma_start);
  for (int64_t i = 0; i < schedule.num_steps; ++i) gm_substep(tile, schedule.steps[i]);
  for (int c = 0; c < C; ++c) {
    const Lanes x_src = load_some(problem.x_src + state + c * pixels, valid);
    const Lanes x_dst = gm_leave(tile, c, x_src, sigma_src, schedule.sigma_dst);
    store_some(x_dst, problem.x_dst + state + c * pixels, valid);
  }
}

size_t gm_bytes(const piflow_gm& problem) {
  const int K = padded_components(int(problem.num_components));
  return size_t(GmTile<Lanes>::size(K, int(problem.num_channels))) * sizeof(Lanes);
}

void gm_pixels(const piflow_gm& problem, const GmSchedule& schedule, int64_t sample, int64_t first,
               int64_t last, void* memory) {
  for (; first < last; first += Lanes::width) {
    gm_tile(problem, schedule, sample, first, static_cast<Lanes*>(memory));
  }
}

void weighted_sum(const float* const* sources, const float* weights, int64_t count, int64_t size,
                  float* dst) {
  constexpr int kSums = 4;  // at once, to hide the latency of fma
  int64_t i = 0;
  for (; i + kSums * Lanes::width <= size; i += kSums * Lanes::width) {
    Lanes sums[kSums];
    for (Lanes& sum : sums) sum = Lanes::splat(0.0f);
    for (int64_t n = 0; n < count; ++n) {
      const Lanes weight = Lanes::splat(weights[n]);
      for (int j = 0; j < kSums; ++j) {
        sums[j] = fma(weight, Lanes::load(sources[n] + i + j * Lanes::width), sums[j]);
      }
    }
    for (int j = 0; j < kSums; ++j) sums[j].store(dst + i + j * Lanes::width);
  }
  for (; i < size; i += Lanes::width) {
    Lanes sum = Lanes::splat(0.0f);
    for (int64_t n = 0; n < count; ++n) {
      sum = fma(Lanes::splat(weights[n]), load_some(sources[n] + i, size - i), sum);
    }
    store_some(sum, dst + i, size - i);
  }
}

#define PIFLOW_TEXT_OF(name) #name
#define PIFLOW_TEXT(name) PIFLOW_TEXT_OF(name)
#define PIFLOW_JOIN_OF(a, b) a##b
#define PIFLOW_JOIN(a, b) PIFLOW_JOIN_OF(a, b)

}  // namespace

extern const Isa PIFLOW_JOIN(isa_, PIFLOW_ISA);
const Isa PIFLOW_JOIN(isa_, PIFLOW_ISA) = {PIFLOW_TEXT(PIFLOW_ISA), Lanes::width, gm_bytes, gm_pixels,
                                           weighted_sum};

}  // namespace piflow
