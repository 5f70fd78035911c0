// What a web page calls: the rollout of one image, with nothing of the C or C++ library. The page owns the
// memory and lays everything out in it, from where `__heap_base` says that it is free. Built by
// ../web/kernel.sh.
#include "isa.h"

namespace piflow {

extern const Isa isa_wasm;

namespace {

piflow_gm one_image(int32_t num_components, int32_t num_channels, int32_t pixels, int32_t substeps) {
  piflow_gm problem = {};
  problem.batch = 1;
  problem.num_components = num_components;
  problem.num_channels = num_channels;
  problem.pixels = pixels;
  problem.substeps = substeps;
  return problem;
}

}  // namespace
}  // namespace piflow

using namespace piflow;

extern "C" {

// Bytes of working memory of a substep, and of what belongs to no substep.
__attribute__((export_name("bytes_of_substep"))) int32_t bytes_of_substep() {
  return int32_t(sizeof(GmStep) > sizeof(GramStep) ? sizeof(GmStep) : sizeof(GramStep));
}
__attribute__((export_name("bytes_of_pixels"))) int32_t bytes_of_pixels(int32_t num_components,
                                                                        int32_t num_channels) {
  return int32_t(isa_wasm.gm_bytes(one_image(num_components, num_channels, 1, 1)));
}

// As `piflow_gm_rollout`, of one image. `steps` and `memory`: working memory, aligned to 16.
__attribute__((export_name("gm_rollout"))) void gm_rollout(
    int32_t num_components, int32_t num_channels, int32_t pixels, int32_t substeps, const float* means,
    const float* logweights, const float* x_src, const float* x_start, float* x_dst, const double* sigmas,
    double sigma_src, double variance, double eps, void* steps, void* memory) {
  piflow_gm problem = one_image(num_components, num_channels, pixels, substeps);
  problem.means = means;
  problem.logweights = logweights;
  problem.x_src = x_src;
  problem.x_start = x_start;
  problem.x_dst = x_dst;
  problem.sigma_src = &sigma_src;
  problem.variance = &variance;
  problem.sigmas = sigmas;
  problem.eps = eps;

  const bool gram = gram_is_faster(num_components, num_channels);
  const GmSchedule schedule = gm_schedule(problem, 0, gram ? nullptr : static_cast<GmStep*>(steps),
                                          gram ? static_cast<GramStep*>(steps) : nullptr);
  isa_wasm.gm_pixels(problem, schedule, 0, 0, pixels, memory);
}
}
