/* The compiled rollout of piflow-edge: a plain C interface.
 *
 * A policy (one student output) is carried from one noise level to the next over any number of Euler
 * substeps, without the network. Link the shared library that stands beside this header in the installed
 * package; it needs nothing but the C++ run-time. tests/rollout_example.c is a complete program.
 *
 * Every array is C-contiguous. `pixels` is H * W, or T * H * W with a frame axis. Nothing is kept between
 * calls and no input is written to; calls may run at the same time from several threads. A NaN stays in its
 * pixel. The result does not depend, to the last bit, on the threads or on how a batch is split over calls.
 *
 * Mathematics: Chen et al., pi-Flow, arXiv:2510.14974. Noise levels sigma lie in [0, 1];
 * x_t = (1 - sigma) x_0 + sigma noise.
 */
#ifndef PIFLOW_KERNELS_H
#define PIFLOW_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define PIFLOW_API __declspec(dllexport)
#else
#define PIFLOW_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Goes up when a struct or a function below changes; compare with piflow_abi_version(). */
#define PIFLOW_ABI_VERSION 2

typedef enum piflow_status {
  PIFLOW_OK = 0,
  PIFLOW_BAD_ARGUMENT = 1, /* a null pointer, a size below 1, a noise level outside [0, 1], eps not above 0 */
  PIFLOW_OUT_OF_MEMORY = 2,
  PIFLOW_UNKNOWN_ISA = 3 /* `isa` names code that this library lacks or this processor cannot run */
} piflow_status;

/* How to run. All zero, or a null pointer in its place, means: choose well. */
typedef struct piflow_options {
  int32_t num_threads; /* at most this many; 0: as many as the machine has. Small problems use fewer. */
  const char*
      isa; /* "avx512", "avx2", "baseline" (on aarch64 that is NEON); null: the best this processor has */
} piflow_options;

/* Rollout of a Gaussian-mixture policy. K = num_components, C = num_channels. */
typedef struct piflow_gm {
  int64_t batch, num_components, num_channels, pixels, substeps;
  const float* means; /* (batch, K, C, pixels): component means as velocities, as the student gives them */
  const float* logweights; /* (batch, K, pixels); need not be normalised; -inf drops a component */
  const float* x_src;      /* (batch, C, pixels): state at which the student was called */
  const float* x_start;    /* (batch, C, pixels): state to start from; usually x_src itself */
  float* x_dst;            /* (batch, C, pixels): the result; overlaps no input */
  const double* sigma_src; /* (batch,): noise level of x_src */
  const double*
      variance;         /* (batch,): of each component in x_0: exp(2 logstd) sigma_src^2, times temperature */
  const double* sigmas; /* (substeps + 1, batch): noise levels to step through; equal neighbours: no step */
  double eps;           /* floor under noise levels and denominators, above 0 */
} piflow_gm;

PIFLOW_API piflow_status piflow_gm_rollout(const piflow_gm* problem, const piflow_options* options);

/* Rollout of a DX policy in closed form: Euler's recursion is linear, so its end is a weighted sum,
 * x_dst = weights[0] x_start + weights[1] x_src + sum_i weights[2 + i] grid_i, whose weights depend on time
 * only. */
typedef struct piflow_dx {
  int64_t batch, num_nodes, size; /* size: C * pixels, the numbers in one state */
  const float* grid;              /* (batch, num_nodes, size) */
  const float* x_src;             /* (batch, size) */
  const float* x_start;           /* (batch, size); where it is x_src itself, that is read once */
  float* x_dst;                   /* (batch, size): the result; overlaps no input */
  const double* weights;          /* (batch, 2 + num_nodes) */
} piflow_dx;

PIFLOW_API piflow_status piflow_dx_rollout(const piflow_dx* problem, const piflow_options* options);

/* Starting noise: standard normals by Philox4x32-10 and Box-Muller, the same in every language. An image's
 * stream is addressed by (seed, index, draw); piflow_edge/noise.py says how, word by word. */
typedef struct piflow_noise {
  int64_t count, size; /* images, and numbers in one image */
  uint64_t seed;
  const uint64_t* indices; /* (count,): the number of each image */
  uint32_t draw;           /* 0: the starting noise; i: what the state is re-noised with after the i-th call */
  float* normals;          /* (count, size): the result */
} piflow_noise;

PIFLOW_API piflow_status piflow_normal(const piflow_noise* problem, const piflow_options* options);

/* Names of the instruction sets this library runs here, best first, parted by spaces. */
PIFLOW_API const char* piflow_isas(void);

PIFLOW_API int32_t piflow_abi_version(void);

#ifdef __cplusplus
}
#endif
#endif
