// A bundle, opened, that makes images: the sampling loop of piflow_edge/sampling.py, and what surrounds it.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../piflow.h"
#include "bundle.h"
#include "policies.h"
#include "sessions.h"

namespace piflow {

struct Images {
  int64_t count = 0, height = 0, width = 0, channels = 0;
  std::vector<uint8_t> pixels;
  std::vector<float> latents;
};

// A running call, which another thread may end.
struct Call {
  Ort::RunOptions options;
  std::atomic<bool> is_cancelled{false};
};

class Generator {
 public:
  Generator(const std::string& folder, const piflow_load_options& options);

  Images make(const piflow_request& request);
  Images decode(std::vector<float> latents, const Call& call) const;
  void cancel();

 private:
  void check(const piflow_request& request) const;
  std::vector<float> draw(const piflow_request& request, int64_t first, int64_t count, const Arrays& steering,
                          const Call& call) const;
  std::vector<float> draw_noise(const piflow_request& request, int64_t first, int64_t count, uint32_t draw) const;

  Bundle bundle_;
  int num_threads_;
  std::map<std::string, Session> sessions_;
  std::mutex mutex_;
  std::set<Call*> calls_;
};

// What piflow_preview needs of a callback's moment.
struct Trajectory {
  const Generator& generator;
  const Call& call;
  const Policy& policy;
  const std::vector<float>& state;
  double sigma_t;

  // An Euler step down to 0 ends in the policy's estimate of the clean latents.
  Images preview() const {
    return generator.decode(sigma_t > 0 ? policy.integrate(state, {sigma_t, 0.0}) : state, call);
  }
};

}  // namespace piflow
