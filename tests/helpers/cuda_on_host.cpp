// rollout.cu, compiled as C++ and run on the CPU, so that its indices, barriers and tails are tested where
// there is no GPU. Every thread of a block has a stack here, and they take turns: each runs to the next point at
// which the block meets. Blocks run one after the other.
#include <ucontext.h>

#include <functional>
#include <memory>
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

static class Block {
 public:
  void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    for (auto& numbers : numbers_) numbers.assign(threads, 0);
    while (threads_.size() < threads) threads_.push_back(std::make_unique<Thread>());
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = *threads_[t];
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack;
      thread.context.uc_stack.ss_size = sizeof thread.stack;
      thread.context.uc_link = &main_;
      makecontext(&thread.context, begin, 0);
      thread.is_done = false, thread.exchanges = 0;
    }
    for (unsigned left = threads; left;) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
        Thread& thread = *threads_[threadIdx.x];
        if (thread.is_done) continue;
        swapcontext(&main_, &thread.context);
        left -= thread.is_done;
      }
    }
  }
  // Until all others have come as far.
  void meet() { swapcontext(&threads_[threadIdx.x]->context, &main_); }
  // What another thread of the block brings to this meeting.
  float exchange(float value, unsigned other) {
    // In turn in two places: who writes the next one may come before others have read this one.
    std::vector<float>& numbers = numbers_[threads_[threadIdx.x]->exchanges++ % 2];
    numbers[threadIdx.x] = value;
    meet();
    return numbers[other];
  }

 private:
  struct Thread {
    ucontext_t context;
    bool is_done;
    unsigned exchanges;
    char stack[256 << 10];
  };
  static void begin();
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<float> numbers_[2];
  ucontext_t main_;
} block;

void Block::begin() {
  (*block.kernel_)();
  block.threads_[threadIdx.x]->is_done = true;
}

static void __syncthreads() { block.meet(); }
static float __shfl_xor_sync(unsigned, float value, int bits) {
  return block.exchange(value, threadIdx.x ^ unsigned(bits));
}

#include "rollout.cu"

namespace piflow {
Chunk shared[(227 << 10) / sizeof(Chunk)];  // what a block has on the largest GPU known here
}

template <class Problem>
static void launch(void (*kernel)(const Problem&), const Problem& problem, unsigned blocks, unsigned threads) {
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    block.run(threads, [&] { kernel(problem); });
  }
}

// The mixtures test_cuda.py knows as COMPILED, each in every storage; those that four threads may share also so.
#define MIXTURES(f) f(1, 1) f(3, 2) f(4, 16) f(5, 3) f(8, 1) f(17, 17)
#define LAUNCH(K, C, storage, most_threads, shared_by)                                                  \
  if (num_components == K && num_channels == C && kind == piflow::storage && lanes == shared_by &&      \
      (kind != piflow::kShared || threads == most_threads)) {                                           \
    launch(piflow::gm_rollout<K, C, piflow::storage, most_threads, shared_by>, problem, blocks, threads); \
    return 0;                                                                                           \
  }
#define LAUNCH_ANY(K, C)                                                                             \
  LAUNCH(K, C, kRegisters, 128, 4) LAUNCH(K, C, kRegisters, 128, 1) LAUNCH(K, C, kShared, 128, 1) \
  LAUNCH(K, C, kShared, 32, 1) LAUNCH(K, C, kLocal, 128, 1)

// 1 for a mixture or a block that is not among them.
extern "C" int run_gm(int num_components, int num_channels, int kind, int lanes, unsigned blocks,
                      unsigned threads, const piflow::GmProblem& problem) {
  MIXTURES(LAUNCH_ANY)
  return 1;
}

extern "C" void run_dx(unsigned blocks, unsigned block, const piflow::DxProblem& problem) {
  launch(piflow::dx_rollout, problem, blocks, block);
}

extern "C" float widen(unsigned short bits, int format) { return piflow::widened(bits, format); }
