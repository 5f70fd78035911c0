/* A complete C program that links the compiled kernels. Here both components of the mixture predict one
 * velocity with next to no spread, and all nodes of the DX grid another, so that the paths are straight
 * lines: from noise at sigma = 1 they end at noise - velocity.
 *
 *   cc rollout_example.c -I DIR DIR/libpiflow_kernels.so -Wl,-rpath,DIR -lm
 *
 * with DIR the folder python -c "import piflow_edge.kernels as k; print(*k.__path__)" names.
 */
#include <math.h>
#include <stdio.h>

#include "piflow_kernels.h"

enum {
  BATCH = 1,
  COMPONENTS = 2,
  NODES = 3,
  CHANNELS = 3,
  PIXELS = 5,
  SIZE = CHANNELS * PIXELS,
  SUBSTEPS = 8
};

static int all_near(const float* x, const float* noise, float velocity) {
  for (int i = 0; i < SIZE; ++i) {
    if (!(fabsf(x[i] - (noise[i] - velocity)) < 1e-6f)) return 0;
  }
  return 1;
}

int main(void) {
  float noise[SIZE], x_dst[SIZE], means[COMPONENTS * SIZE], logweights[COMPONENTS * PIXELS],
      grid[NODES * SIZE];
  for (int i = 0; i < SIZE; ++i) noise[i] = 0.1f * (float)(i - 7);
  for (int i = 0; i < COMPONENTS * SIZE; ++i) means[i] = 0.75f;
  for (int i = 0; i < COMPONENTS * PIXELS; ++i) logweights[i] = i < PIXELS ? 0.0f : -1.0f;
  for (int i = 0; i < NODES * SIZE; ++i) grid[i] = -0.5f;

  double sigmas[SUBSTEPS + 1];
  for (int i = 0; i <= SUBSTEPS; ++i) sigmas[i] = 1.0 - (double)i / SUBSTEPS;
  const double sigma_src = 1.0, variance = exp(-20.0);

  if (piflow_abi_version() != PIFLOW_ABI_VERSION) return 1;
  const piflow_gm gm = {
      .batch = BATCH,
      .num_components = COMPONENTS,
      .num_channels = CHANNELS,
      .pixels = PIXELS,
      .substeps = SUBSTEPS,
      .means = means,
      .logweights = logweights,
      .x_src = noise,
      .x_start = noise,
      .x_dst = x_dst,
      .sigma_src = &sigma_src,
      .variance = &variance,
      .sigmas = sigmas,
      .eps = 1e-4,
  };
  if (piflow_gm_rollout(&gm, NULL) != PIFLOW_OK || !all_near(x_dst, noise, 0.75f)) return 2;

  /* At sigma = 0 a grid policy ends at its node 0, x_src - sigma_src * grid[0], from wherever it came. */
  const double weights[2 + NODES] = {0.0, 1.0, -sigma_src, 0.0, 0.0};
  const piflow_dx dx = {
      .batch = BATCH,
      .num_nodes = NODES,
      .size = SIZE,
      .grid = grid,
      .x_src = noise,
      .x_start = noise,
      .x_dst = x_dst,
      .weights = weights,
  };
  const piflow_options one_thread = {.num_threads = 1};
  if (piflow_dx_rollout(&dx, &one_thread) != PIFLOW_OK || !all_near(x_dst, noise, -0.5f)) return 3;

  printf("kernels for %s agree with the straight lines\n", piflow_isas());
  return 0;
}
