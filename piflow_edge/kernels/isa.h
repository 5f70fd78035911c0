// What the library compiles once per instruction set (isa.cpp) and picks from at run time (kernels.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "gm_schedule.h"

namespace piflow {

struct Isa {
  const char* name;
  int width;  // floats in a register
  // Bytes of working memory `gm_pixels` needs, aligned to 64.
  size_t (*gm_bytes)(const piflow_gm& problem);
  // Carries pixels first ... last - 1 of one sample through the whole rollout.
  void (*gm_pixels)(const piflow_gm& problem, const GmSchedule& schedule, int64_t sample, int64_t first,
                    int64_t last, void* memory);
  // dst[i] = sum_n weights[n] sources[n][i] for i < size
  void (*weighted_sum)(const float* const* sources, const float* weights, int64_t count, int64_t size,
                       float* dst);
  // `size` normals of one image and draw, from block `first` on
  void (*normals)(uint64_t seed, uint64_t index, uint32_t draw, uint32_t first, int64_t size, float* dst);
};

}  // namespace piflow
