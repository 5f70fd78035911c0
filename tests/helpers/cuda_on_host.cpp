// rollout.cu, compiled as C++ and run on the CPU, so that its indices, barriers and tails are tested where
// there is no GPU. Every thread of a block is a thread here; blocks run one after the other.
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "lanes.h"

#define __global__
#define __shared__
#define __launch_bounds__(threads)

struct Place {
  unsigned x;
};
static thread_local Place threadIdx, blockIdx, blockDim;

static float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static class Barrier {
 public:
  void set(unsigned count) { count_ = count; }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  unsigned count_ = 0, arrived_ = 0, round_ = 0;
} barrier;

static void __syncthreads() { barrier.wait(); }

#include "rollout.cu"

namespace piflow {
Chunk shared[(227 << 10) / sizeof(Chunk)];  // what a block has on the largest GPU known here
}

template <class Problem>
static void launch(void (*kernel)(const Problem&), const Problem& problem, unsigned blocks,
                   unsigned threads) {
  barrier.set(threads);
  std::vector<std::thread> block;
  for (unsigned thread = 0; thread < threads; ++thread) {
    block.emplace_back([=, &problem] {
      threadIdx.x = thread;
      blockDim.x = threads;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        kernel(problem);
        barrier.wait();  // shared memory goes to the next block
      }
    });
  }
  for (std::thread& thread : block) thread.join();
}

// The mixtures test_cuda.py knows as COMPILED, each in every storage.
#define MIXTURES(f) f(1, 1) f(3, 2) f(4, 16) f(5, 3) f(8, 1) f(17, 17)
#define LAUNCH(K, C, storage, threads)                                                  \
  if (num_components == K && num_channels == C && kind == piflow::storage &&            \
      (kind != piflow::kShared || block == threads)) {                                  \
    launch(piflow::gm_rollout<K, C, piflow::storage, threads>, problem, blocks, block); \
    return 0;                                                                           \
  }
#define LAUNCH_ANY(K, C) \
  LAUNCH(K, C, kRegisters, 128) LAUNCH(K, C, kShared, 128) LAUNCH(K, C, kShared, 32) LAUNCH(K, C, kLocal, 128)

// 1 for a mixture or a block that is not among them.
extern "C" int run_gm(int num_components, int num_channels, int kind, unsigned blocks, unsigned block,
                      const piflow::GmProblem& problem) {
  MIXTURES(LAUNCH_ANY)
  return 1;
}

extern "C" void run_dx(unsigned blocks, unsigned block, const piflow::DxProblem& problem) {
  launch(piflow::dx_rollout, problem, blocks, block);
}

extern "C" float widen(unsigned short bits, int format) { return piflow::widened(bits, format); }
