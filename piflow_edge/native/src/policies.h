// What a policy is: one network output as a velocity field that holds for a whole segment; the kernels integrate it.
#pragma once

#include <memory>
#include <vector>

#include "bundle.h"
#include "sessions.h"

namespace piflow {

class Policy {
 public:
  virtual ~Policy() = default;
  // The state after Euler steps along noise levels.
  virtual std::vector<float> integrate(const std::vector<float>& state, const std::vector<double>& sigmas) const = 0;
};

// The policy that the student's outputs at `x_src` stand for. `temperature`: 1 and above change nothing.
std::unique_ptr<Policy> open_policy(const Manifest& manifest, Arrays outputs, std::vector<float> x_src,
                                    double sigma_src, double temperature, int num_threads);

}  // namespace piflow
