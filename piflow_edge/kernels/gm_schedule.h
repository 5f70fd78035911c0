// A sample's substeps, worked out once for all of its pixels.
#pragma once

#include "gm_gram.h"
#include "piflow_kernels.h"

namespace piflow {

// The substeps of one sample that move, in the form its mixture takes; the other form's pointer is null, and
// what stands after the levels is for Gram's form only.
struct GmSchedule {
  const GmStep* steps;
  const GramStep* gram_steps;
  int64_t num_steps;
  double sigma_start, sigma_dst;
  GramSpan span;        // at the end
  bool moved, floored;  // as gram_enter wants to know
};

namespace {

// `steps` or `gram_steps` has room for all substeps, and is filled; the other one is null.
inline GmSchedule gm_schedule(const piflow_gm& p, int64_t sample, GmStep* steps, GramStep* gram_steps) {
  const double sigma_src = p.sigma_src[sample], *sigmas = p.sigmas + sample;
  GmSchedule schedule = {};
  schedule.steps = steps;
  schedule.gram_steps = gram_steps;
  schedule.sigma_start = sigmas[0];
  schedule.sigma_dst = sigmas[p.substeps * p.batch];
  schedule.span.start = 1;
  schedule.moved = p.x_start != p.x_src || schedule.sigma_start != sigma_src;
  for (int64_t i = 0; i < p.substeps; ++i, sigmas += p.batch) {
    const double sigma = sigmas[0], sigma_next = sigmas[p.batch];
    if (sigma == sigma_next) continue;  // this sample is done, others of the batch are not
    const GmCoefficients<double> step =
        gm_coefficients(sigma, sigma_next, sigma_src, p.variance[sample], p.eps);
    const int64_t at = schedule.num_steps++;
    if (steps != nullptr) {
      steps[at] = rounded(step);
      continue;
    }
    gram_steps[at] = gram_step(step, &schedule.span);
    if (!schedule.moved) gram_steps[at].logit_start = 0;
    schedule.floored |= gram_steps[at].logit_velocity != 0;
  }
  return schedule;
}

}  // namespace
}  // namespace piflow
