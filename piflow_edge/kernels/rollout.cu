// The rollouts on an NVIDIA GPU, one launch each: compiled at run time by cuda.py, with NVRTC, for the device
// that is there. This file needs no header of CUDA's, for NVRTC's package brings none.
//
// A Gaussian-mixture rollout gives every pixel a thread. The thread reads its pixel's numbers once, carries
// them through all substeps, and writes the state once; threads share nothing but the time coefficients. What
// limits it is therefore where a pixel's K (C + 3) + 4 C numbers lie meanwhile, for every substep reads the
// K C offsets twice. K and C are compiled in, and Storage is chosen for them (`gm_plan` in cuda.py):
//
//   kRegisters  all of them, with every loop unrolled: no memory is touched between the first read and the
//               last write. Up to about K C = 128.
//   kShared     what runs over components lies in shared memory, what runs over channels in registers, up to
//               32 of them. A pixel's group of four is one 16-byte access, and the groups of neighbouring
//               threads alternate, so that a warp's accesses meet all banks alike. A block has as few threads
//               as that takes.
//   kLocal      for mixtures too large even so: the thread's own memory, which the hardware interleaves in
//               the same way and keeps in the L1 and L2 caches as it can.
//
// Where an image has few pixels, one thread each leaves most of a GPU idle, and a substep takes as long as its
// instructions come one after the other. There four neighbouring threads share a pixel (PIFLOW_LANES is 4): each has
// every fourth component, in registers, and sums go through `of_neighbour`. What is left of a pixel all four work out,
// alike to the last bit. How many threads a pixel has depends on the mixture and on the image's size alone, not on how
// many images come at a time, for sums of four parts round otherwise.
//
// Means are kept in float32 also where they come in half precision: what is kept are their differences to
// their mean, which half precision would round.
#if defined(PIFLOW_STORAGE)
// Only as far as it brings registers: with hundreds of channels the compiler would take minutes.
#if PIFLOW_STORAGE == 0 || PIFLOW_C <= 32
#define PIFLOW_UNROLL_CHANNELS _Pragma("unroll")
#else
#define PIFLOW_UNROLL_CHANNELS _Pragma("unroll 1")
#endif
#if PIFLOW_STORAGE == 0
#define PIFLOW_UNROLL_COMPONENTS _Pragma("unroll")
#else
#define PIFLOW_UNROLL_COMPONENTS _Pragma("unroll 1")
#endif
#endif

#include "gm_rollout.h"

namespace piflow {

// How the numbers of an input are stored; as `FORMATS` in device_arrays.py.
enum Format { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
// Where a pixel's numbers lie; as `gm_plan` in cuda.py says.
enum Storage { kRegisters = 0, kShared = 1, kLocal = 2 };

// These are filled in by cuda.py, field by field. All arrays are C-contiguous, in the device's memory.
struct Input {
  const void* numbers;
  Index format;
};

struct GmProblem {
  Input means, logweights;  // (batch, K, C, pixels), (batch, K, pixels); natural logarithms
  Input x_src, x_start;     // (batch, C, pixels)
  Input variance;           // (batch,): of each component in x_0; with `is_logstd` what the network says of it
  float* x_dst;             // (batch, C, pixels)
  const double* levels;     // (1 + substeps + 1, batch): noise level of x_src, then those to step through
  double eps, temperature;  // the latter: weights to the power 1 / temperature, variance times temperature
  Index batch, pixels, substeps, is_logstd;
};

struct DxProblem {
  Input grid;            // (batch, num_nodes, size)
  Input x_src, x_start;  // (batch, size)
  float* x_dst;          // (batch, size)
  const float* weights;  // (batch, 2 + num_nodes): of x_start, x_src and the nodes
  Index batch, num_nodes, size;
};

// Coefficients of so many substeps are worked out at a time, each by one thread, for the block to share.
constexpr int kStepsAtOnce = 128;

// How much of it there is the launch says, see `gm_plan`. First the steps, then, with kShared, the
// components, in units of a group, so that each is one access.
struct alignas(kGroup * sizeof(float)) Chunk {
  unsigned char bytes[kGroup * sizeof(float)];
};
extern __shared__ Chunk shared[];

namespace {

PIFLOW_FN float widened(unsigned short bits, Index format) {
  if (format == kBFloat16) return __uint_as_float(unsigned(bits) << 16);
  // Exponents are 112 apart, and the product is exact for subnormal numbers too.
  const unsigned magnitude = unsigned(bits & 0x7fff) << 13, sign = unsigned(bits & 0x8000) << 16;
  const bool finite = magnitude < 0x0f800000u;
  const float value = __uint_as_float(finite ? magnitude : magnitude | 0x7f800000u);
  return (sign ? -value : value) * (finite ? 0x1p112f : 1.0f);
}

// Of the thread whose number differs in these bits, of four that share a pixel.
template <class V>
PIFLOW_FN V of_neighbour(V value, int bits) {
  return {__shfl_xor_sync(0xffffffffu, value.v, bits)};
}

PIFLOW_FN Scalar load(Input input, Index i) {
  if (input.format == kFloat32) return {static_cast<const float*>(input.numbers)[i]};
  return {widened(static_cast<const unsigned short*>(input.numbers)[i], input.format)};
}

// As GMPolicy does it, in the same roundings.
PIFLOW_FN float gm_variance(const GmProblem& p, Index sample, double sigma_src) {
  float variance = load(p.variance, sample).v;
  if (p.is_logstd) variance = expf(2.0f * variance) * float(sigma_src * sigma_src);
  return p.temperature < 1 ? variance * float(p.temperature) : variance;
}

template <int kSpread, int kHeld>
PIFLOW_FN void gm_sharpen(GmTile<Scalar, kSpread, kHeld> tile, float temperature) {
  const Scalar largest = gm_largest_logweight(tile);
  PIFLOW_UNROLL_COMPONENTS
  for (int k = 0; k < tile.K; ++k) {
    Scalar& logweight = tile.logweights[tile.at(k)];
    logweight = (logweight - largest) / Scalar{temperature};
  }
}

template <int K, int C, int kSpread, int kHeld>
PIFLOW_FN void gm_carry(const GmProblem& p, GmTile<Scalar, kSpread, kHeld> tile, GmStep* steps) {
  constexpr int kLanes = kGroup / kHeld;  // threads that share a pixel
  const Index lane = threadIdx.x % kLanes, in_block = blockDim.x / kLanes;
  const Index tiles = (p.pixels + in_block - 1) / in_block;
  const Index sample = blockIdx.x / tiles, place = blockIdx.x % tiles * in_block + threadIdx.x / kLanes;
  const bool inside = place < p.pixels;
  const Index pixel = inside ? place : p.pixels - 1;  // past the end: the last one again, for the barriers

  const Index mixture = sample * K * p.pixels + pixel, state = sample * C * p.pixels + pixel;
  PIFLOW_UNROLL_COMPONENTS
  for (int held = 0; held < tile.K; ++held) {
    const Index k = kLanes * held + lane;
    const bool padding = k >= K;
    tile.logweights[tile.at(held)] =
        padding ? Scalar{-__uint_as_float(0x7f800000u)} : load(p.logweights, mixture + k * p.pixels);
    PIFLOW_UNROLL_CHANNELS
    for (int c = 0; c < C; ++c) {
      const Index i = (sample * K * C + k * C + c) * p.pixels + pixel;
      tile.offset(held, c) = padding ? Scalar{0.0f} : load(p.means, i);
    }
  }
  if (p.temperature < 1) gm_sharpen(tile, float(p.temperature));
  PIFLOW_UNROLL_CHANNELS
  for (int c = 0; c < C; ++c) {
    tile.noise[c] = load(p.x_src, state + c * p.pixels);
    tile.y[c] = load(p.x_start, state + c * p.pixels) - tile.noise[c];
  }

  const double sigma_src = p.levels[sample], variance = gm_variance(p, sample, sigma_src);
  const double* sigmas = p.levels + p.batch + sample;
  gm_enter(tile, sigma_src, sigmas[0]);
  for (Index first = 0; first < p.substeps; first += kStepsAtOnce, sigmas += kStepsAtOnce * p.batch) {
    const int count = int(p.substeps - first < kStepsAtOnce ? p.substeps - first : kStepsAtOnce);
    __syncthreads();  // nobody needs the last ones any more
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
      steps[i] = gm_step(sigmas[i * p.batch], sigmas[(i + 1) * p.batch], sigma_src, variance, p.eps);
    }
    __syncthreads();
    // Where a level comes twice, for others of the batch still move, the step's coefficients leave y as it is.
    for (int i = 0; i < count; ++i) gm_substep(tile, steps[i]);
  }

  const double sigma_dst = p.levels[(1 + p.substeps) * p.batch + sample];
  if (!inside || lane) return;
  PIFLOW_UNROLL_CHANNELS
  for (int c = 0; c < C; ++c) {
    const Index i = state + c * p.pixels;
    p.x_dst[i] = gm_leave(tile, c, load(p.x_src, i), sigma_src, sigma_dst).v;
  }
}

// Threads is the size of the block; with kShared exactly, else at most. Lanes is 4 with kRegisters only, else 1.
template <int K, int C, Storage kStorage, int kThreads, int kLanes>
PIFLOW_FN void gm_rollout(const GmProblem& p) {
  constexpr int kPadded = padded_components(K) / kLanes;
  GmStep* steps = reinterpret_cast<GmStep*>(shared);
  Scalar channels[GmTile<Scalar>::channel_size(C)];
  if constexpr (kStorage == kShared) {
    Chunk* mine = shared + kStepsAtOnce * sizeof(GmStep) / sizeof(Chunk) + threadIdx.x;
    Scalar* components = reinterpret_cast<Scalar*>(mine);
    gm_carry<K, C>(p, GmTile<Scalar, kThreads>::carve(components, channels, kPadded, C), steps);
  } else {
    using Tile = GmTile<Scalar, 1, kGroup / kLanes>;
    Scalar components[Tile::component_size(kPadded, C)];
    gm_carry<K, C>(p, Tile::carve(components, channels, kPadded, C), steps);
  }
}

// One number of the result per thread, summed in the order in which the CPU kernel sums.
PIFLOW_FN void dx_rollout(const DxProblem& p) {
  const Index tiles = (p.size + blockDim.x - 1) / blockDim.x;
  const Index sample = blockIdx.x / tiles, place = blockIdx.x % tiles * blockDim.x + threadIdx.x;
  if (place >= p.size) return;
  const float* weights = p.weights + sample * (2 + p.num_nodes);
  const Index state = sample * p.size + place;
  Scalar sum = fma(Scalar{weights[0]}, load(p.x_start, state), Scalar{0.0f});
  // Where it starts at its source, cuda.py has added the two weights up.
  if (p.x_src.numbers != p.x_start.numbers) sum = fma(Scalar{weights[1]}, load(p.x_src, state), sum);
  for (Index n = 0; n < p.num_nodes; ++n) {
    sum = fma(Scalar{weights[2 + n]}, load(p.grid, (sample * p.num_nodes + n) * p.size + place), sum);
  }
  p.x_dst[state] = sum.v;
}

}  // namespace
}  // namespace piflow

#if defined(PIFLOW_STORAGE)
extern "C" __global__ void __launch_bounds__(PIFLOW_THREADS) piflow_gm(const piflow::GmProblem problem) {
  using namespace piflow;
  gm_rollout<PIFLOW_K, PIFLOW_C, Storage(PIFLOW_STORAGE), PIFLOW_THREADS, PIFLOW_LANES>(problem);
}
#endif
#if defined(__CUDACC__)
extern "C" __global__ void piflow_dx(const piflow::DxProblem problem) { piflow::dx_rollout(problem); }
#endif
