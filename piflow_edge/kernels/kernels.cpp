// The C interface: checks, choice of instruction set, time coefficients, threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"

namespace piflow {

// Each is isa.cpp compiled once more; the build says which there are.
extern const Isa isa_baseline;
extern const Isa isa_avx2;
extern const Isa isa_avx512;

namespace {

// Pixels a thread takes at a time: whole cache lines of every row, yet enough pieces in a small image.
constexpr int64_t kPixels = 64;
// Numbers of a weighted sum a thread takes at a time.
constexpr int64_t kNumbers = 4096;
// Work below which one more thread costs more than it brings; starting it takes some 20 microseconds.
constexpr double kOperationsPerThread = 1e6;
constexpr int64_t kBytesPerThread = 1 << 20;
// Philox blocks a thread takes at a time, and how many make a thread worth starting: each takes some 20 to 40 ns.
constexpr int64_t kBlocks = 512;
constexpr int64_t kBlocksPerThread = 4096;

// Best first.
const std::vector<const Isa*>& usable_isas() {
  static const std::vector<const Isa*> usable = [] {
    std::vector<const Isa*> isas;
#if defined(PIFLOW_HAVE_avx512) || defined(PIFLOW_HAVE_avx2)
    __builtin_cpu_init();  // for callers that run before the library's own start-up code
#endif
#if defined(PIFLOW_HAVE_avx512)
    if (__builtin_cpu_supports("avx512f")) isas.push_back(&isa_avx512);
#endif
#if defined(PIFLOW_HAVE_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back(&isa_avx2);
#endif
    isas.push_back(&isa_baseline);
    return isas;
  }();
  return usable;
}

const Isa* find_isa(const char* name) {
  for (const Isa* isa : usable_isas()) {
    if (name == nullptr || std::strcmp(isa->name, name) == 0) return isa;
  }
  return nullptr;
}

// Calls work(i) for every i below count on up to num_threads threads, each with a `work` of its own from
// make_work(). Which thread does what is left to chance; no i may touch the result of another.
template <class MakeWork>
void parallel_for(int64_t count, int64_t num_threads, MakeWork make_work) {
  std::atomic<int64_t> next{0};
  const auto run = [&](auto& work) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  auto mine = make_work();
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < std::min(num_threads, count); ++i) {
      helpers.emplace_back([&run, work = make_work()]() mutable { run(work); });
    }
  } catch (const std::exception&) {
    // No thread or no memory for one more: those there are do the work.
  }
  run(mine);
  for (std::thread& helper : helpers) helper.join();
}

int64_t most_threads(const piflow_options& options) {
  return options.num_threads > 0 ? options.num_threads : std::max(1u, std::thread::hardware_concurrency());
}

bool is_level(double sigma) { return sigma >= 0 && sigma <= 1; }  // false for NaN

bool is_sound(const piflow_gm& p) {
  constexpr int64_t kMost = 1 << 24;  // of components or channels, which are counted in int
  return p.batch >= 1 && p.num_components >= 1 && p.num_components <= kMost && p.num_channels >= 1 &&
         p.num_channels <= kMost && p.pixels >= 1 && p.substeps >= 0 && p.eps > 0 && p.means &&
         p.logweights && p.x_src && p.x_start && p.x_dst && p.variance && p.sigma_src && p.sigmas &&
         std::all_of(p.sigma_src, p.sigma_src + p.batch, is_level) &&
         std::all_of(p.sigmas, p.sigmas + (p.substeps + 1) * p.batch, is_level);
}

// Every sample's substeps, in the form of the rollout that its mixture takes.
class GmSchedules {
 public:
  explicit GmSchedules(const piflow_gm& p) {
    const bool gram = gram_is_faster(int(p.num_components), int(p.num_channels));
    const size_t most = size_t(p.substeps);
    gram ? gram_steps_.resize(most * size_t(p.batch)) : steps_.resize(most * size_t(p.batch));
    for (int64_t sample = 0; sample < p.batch; ++sample) {
      const size_t first = most * size_t(sample);
      schedules_.push_back(gm_schedule(p, sample, gram ? nullptr : steps_.data() + first,
                                       gram ? gram_steps_.data() + first : nullptr));
      num_steps_ += schedules_.back().num_steps;
    }
  }

  const GmSchedule& operator[](int64_t sample) const { return schedules_[size_t(sample)]; }
  int64_t num_steps() const { return num_steps_; }

 private:
  std::vector<GmStep> steps_;
  std::vector<GramStep> gram_steps_;
  std::vector<GmSchedule> schedules_;
  int64_t num_steps_ = 0;
};

// Instructions of a substep for one register of pixels, about.
double gm_operations(double K, double C) {
  return gram_is_faster(int(K), int(C)) ? K * (K + 15) : K * (2 * C + 10);
}

void gm_rollout(const piflow_gm& p, const piflow_options& options, const Isa& isa) {
  const GmSchedules schedules(p);
  const double operations = double(schedules.num_steps()) * double(p.pixels) / isa.width *
                            gm_operations(double(p.num_components), double(p.num_channels));
  const int64_t num_threads = std::min(most_threads(options), 1 + int64_t(operations / kOperationsPerThread));
  const int64_t pieces = (p.pixels + kPixels - 1) / kPixels;
  const size_t bytes = isa.gm_bytes(p);
  parallel_for(p.batch * pieces, num_threads, [&] {
    struct alignas(64) Line {
      char bytes[64];
    };
    return [&, memory = std::vector<Line>(bytes / sizeof(Line) + 1)](int64_t i) mutable {
      const int64_t sample = i / pieces, from = i % pieces * kPixels, to = std::min(from + kPixels, p.pixels);
      isa.gm_pixels(p, schedules[sample], sample, from, to, memory.data());
    };
  });
}

bool is_sound(const piflow_dx& p) {
  return p.batch >= 1 && p.num_nodes >= 1 && p.size >= 1 && p.grid && p.x_src && p.x_start && p.x_dst &&
         p.weights;
}

void dx_rollout(const piflow_dx& p, const piflow_options& options, const Isa& isa) {
  const int64_t num_states = p.x_start == p.x_src ? 1 : 2, count = num_states + p.num_nodes;
  std::vector<float> weights;
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    const double* given = p.weights + sample * (2 + p.num_nodes);
    if (num_states == 1) {
      weights.push_back(float(given[0] + given[1]));
    } else {
      weights.insert(weights.end(), {float(given[0]), float(given[1])});
    }
    for (int64_t n = 0; n < p.num_nodes; ++n) weights.push_back(float(given[2 + n]));
  }

  const int64_t bytes = p.batch * count * p.size * int64_t(sizeof(float));
  const int64_t num_threads = std::min(most_threads(options), 1 + bytes / kBytesPerThread);
  const int64_t pieces = (p.size + kNumbers - 1) / kNumbers;
  parallel_for(p.batch * pieces, num_threads, [&] {
    return [&, sources = std::vector<const float*>(size_t(count))](int64_t i) mutable {
      const int64_t sample = i / pieces, from = i % pieces * kNumbers, state = sample * p.size + from;
      sources[0] = p.x_start + state;
      sources[size_t(num_states - 1)] = p.x_src + state;
      for (int64_t n = 0; n < p.num_nodes; ++n) {
        sources[size_t(num_states + n)] = p.grid + (sample * p.num_nodes + n) * p.size + from;
      }
      isa.weighted_sum(sources.data(), weights.data() + sample * count, count,
                       std::min(kNumbers, p.size - from), p.x_dst + state);
    };
  });
}

bool is_sound(const piflow_noise& p) {
  return p.count >= 1 && p.size >= 1 && p.indices && p.normals;
}

void draw_normals(const piflow_noise& p, const piflow_options& options, const Isa& isa) {
  const int64_t blocks = (p.size + 3) / 4, pieces = (blocks + kBlocks - 1) / kBlocks;
  const int64_t num_threads = std::min(most_threads(options), 1 + p.count * blocks / kBlocksPerThread);
  parallel_for(p.count * pieces, num_threads, [&] {
    return [&](int64_t i) {
      const int64_t image = i / pieces, block = i % pieces * kBlocks;
      isa.normals(p.seed, p.indices[image], p.draw, uint32_t(block), std::min(4 * kBlocks, p.size - 4 * block),
                  p.normals + image * p.size + 4 * block);
    };
  });
}

template <class Problem, class Rollout>
piflow_status run(const Problem* problem, const piflow_options* given, Rollout rollout) {
  const piflow_options options = given ? *given : piflow_options{};
  if (problem == nullptr || !is_sound(*problem) || options.num_threads < 0) return PIFLOW_BAD_ARGUMENT;
  const Isa* isa = find_isa(options.isa);
  if (isa == nullptr) return PIFLOW_UNKNOWN_ISA;
  try {
    rollout(*problem, options, *isa);
  } catch (const std::exception&) {  // bad_alloc, or length_error for more than any memory holds
    return PIFLOW_OUT_OF_MEMORY;
  }
  return PIFLOW_OK;
}

}  // namespace
}  // namespace piflow

piflow_status piflow_gm_rollout(const piflow_gm* problem, const piflow_options* options) {
  return piflow::run(problem, options, piflow::gm_rollout);
}

piflow_status piflow_dx_rollout(const piflow_dx* problem, const piflow_options* options) {
  return piflow::run(problem, options, piflow::dx_rollout);
}

piflow_status piflow_normal(const piflow_noise* problem, const piflow_options* options) {
  return piflow::run(problem, options, piflow::draw_normals);
}

const char* piflow_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const piflow::Isa* isa : piflow::usable_isas()) {
      joined += (joined.empty() ? "" : " ") + std::string(isa->name);
    }
    return joined;
  }();
  return names.c_str();
}

int32_t piflow_abi_version(void) { return PIFLOW_ABI_VERSION; }
