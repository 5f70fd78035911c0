// The loops over pixels, compiled once per instruction set: the build passes PIFLOW_ISA, its name, and the
// flags. One object file per set, not target attributes on functions: flags reach the intrinsics and every
// inlined helper alike, in gcc, clang and others. Nothing of the C++ library is used here, for the linker
// would share its inline functions between the sets, and could keep one that this processor cannot run.
#include "isa.h"
#include "philox.h"

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

int gm_components(const piflow_gm& problem) { return padded_components(int(problem.num_components)); }

// One register of pixels: where it lies, and how it comes into a tile and out of it.
struct Place {
  const piflow_gm& problem;
  const GmSchedule& schedule;
  int64_t sample, first;

  int64_t valid() const { return problem.pixels - first; }
  int64_t state(int c) const { return (sample * problem.num_channels + c) * problem.pixels + first; }
  double sigma_src() const { return problem.sigma_src[sample]; }

  void enter(const GmTile<Lanes>& tile) const {
    const int K = int(problem.num_components);
    const float* means = problem.means + sample * K * tile.C * problem.pixels + first;
    const float* logweights = problem.logweights + sample * K * problem.pixels + first;
    for (int k = 0; k < tile.K; ++k) {
      const bool padding = k >= K;
      tile.logweights[k] =
          padding ? Lanes::splat(-HUGE_VALF) : load_some(logweights + k * problem.pixels, valid());
      for (int c = 0; c < tile.C; ++c) {
        const float* mean = means + (int64_t(k) * tile.C + c) * problem.pixels;
        tile.offset(k, c) = padding ? Lanes::splat(0.0f) : load_some(mean, valid());
      }
    }
    for (int c = 0; c < tile.C; ++c) {
      tile.noise[c] = load_some(problem.x_src + state(c), valid());
      tile.y[c] = load_some(problem.x_start + state(c), valid()) - tile.noise[c];
    }
    gm_enter(tile, sigma_src(), schedule.sigma_start);
  }

  void leave(const GmTile<Lanes>& tile) const {
    for (int c = 0; c < tile.C; ++c) {
      const Lanes x_src = load_some(problem.x_src + state(c), valid());
      const Lanes x_dst = gm_leave(tile, c, x_src, sigma_src(), schedule.sigma_dst);
      store_some(x_dst, problem.x_dst + state(c), valid());
    }
  }
};

// N registers of pixels through the whole rollout, which take turns at each substep.
template <int N>
void gm_direct(const Place* places, Lanes* memory) {
  const GmSchedule& schedule = places->schedule;
  const int K = gm_components(places->problem), C = int(places->problem.num_channels);
  GmTile<Lanes> tiles[N];
  for (int i = 0; i < N; ++i) {
    tiles[i] = GmTile<Lanes>::carve(memory + i * GmTile<Lanes>::size(K, C), K, C);
    places[i].enter(tiles[i]);
  }
  for (int64_t step = 0; step < schedule.num_steps; ++step) {
    for (int i = 0; i < N; ++i) gm_substep(tiles[i], schedule.steps[step]);
  }
  for (int i = 0; i < N; ++i) places[i].leave(tiles[i]);
}

// The same in Gram's form.
template <int N>
void gm_gram(const Place* places, Lanes* memory) {
  const GmSchedule& schedule = places->schedule;
  const int K = gm_components(places->problem), C = int(places->problem.num_channels);
  GramTile<Lanes> tiles[N];
  for (int i = 0; i < N; ++i) {
    tiles[i] = GramTile<Lanes>::carve(memory + i * GramTile<Lanes>::size(K, C), K, C);
    places[i].enter(tiles[i].fixed);
    gram_enter(tiles[i], schedule.moved, schedule.floored);
  }
  for (int64_t step = 0; step < schedule.num_steps; ++step) {
    for (int i = 0; i < N; ++i) gram_substep(tiles[i], schedule.gram_steps[step]);
  }
  for (int i = 0; i < N; ++i) {
    gram_leave(tiles[i], schedule.span);
    places[i].leave(tiles[i].fixed);
  }
}

// Whether two registers of pixels take turns, for a substep is a chain of instructions that wait for each
// other. Measured: up to 1.8 times as fast as one after the other while what their substeps read is this
// small, then no faster, and slower from the size of the L1 cache on. (Both in one loop were slower
// everywhere: they spill.)
bool takes_turns(const piflow_gm& problem) {
  constexpr Index kMostBytes = 8 << 10;
  const Index K = gm_components(problem), C = problem.num_channels;
  const Index numbers = gram_is_faster(int(problem.num_components), int(C)) ? K * K : K * C;
  return 2 * numbers * Index(sizeof(Lanes)) <= kMostBytes;
}

size_t gm_bytes(const piflow_gm& problem) {
  const int K = gm_components(problem), C = int(problem.num_channels);
  const bool gram = gram_is_faster(int(problem.num_components), C);
  const Index numbers = gram ? GramTile<Lanes>::size(K, C) : GmTile<Lanes>::size(K, C);
  return size_t(numbers) * sizeof(Lanes) * (takes_turns(problem) ? 2 : 1);
}

void gm_pixels(const piflow_gm& problem, const GmSchedule& schedule, int64_t sample, int64_t first,
               int64_t last, void* memory) {
  Lanes* lanes = static_cast<Lanes*>(memory);
  const bool gram = schedule.gram_steps != nullptr;
  if (takes_turns(problem)) {
    for (; first + Lanes::width < last; first += 2 * Lanes::width) {
      const Place two[] = {{problem, schedule, sample, first},
                           {problem, schedule, sample, first + Lanes::width}};
      gram ? gm_gram<2>(two, lanes) : gm_direct<2>(two, lanes);
    }
  }
  for (; first < last; first += Lanes::width) {
    const Place one[] = {{problem, schedule, sample, first}};
    gram ? gm_gram<1>(one, lanes) : gm_direct<1>(one, lanes);
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
                                           weighted_sum, philox_normals};

}  // namespace piflow
