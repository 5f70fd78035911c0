#include "policies.h"

#include <math.h>

#include <algorithm>
#include <memory>

#include "../piflow.h"
#include "error.h"

namespace piflow {
namespace {

void check_status(piflow_status status) {
  require(status != PIFLOW_OUT_OF_MEMORY, "out of memory in a rollout");
  require(status == PIFLOW_OK, "a rollout was refused: the bundle's numbers are out of range");
}

std::vector<float> take(Arrays& outputs, const char* name, int64_t count) {
  std::vector<float>& values = outputs[name].floats;
  require(int64_t(values.size()) == count, std::string("the student's ") + name + " is of another size than the policy");
  return std::move(values);
}

// The formulas are those of piflow_edge/policies/gm.py.
class Mixture : public Policy {
 public:
  Mixture(const Manifest& manifest, Arrays outputs, std::vector<float> x_src, double sigma_src, double temperature,
          int num_threads)
      : spec_(manifest.policy), x_src_(std::move(x_src)), sigma_src_(sigma_src), options_{num_threads, nullptr} {
    batch_ = int64_t(x_src_.size()) / manifest.latent.size();
    channels_ = manifest.latent.shape[0];
    pixels_ = manifest.latent.shape[1] * manifest.latent.shape[2];
    means_ = take(outputs, "means", batch_ * spec_.num_parts * channels_ * pixels_);
    logweights_ = take(outputs, "logweights", batch_ * spec_.num_parts * pixels_);
    const std::vector<float> logstds = take(outputs, "logstds", batch_);
    const double sharpness = temperature >= 1 ? 1 : std::max(temperature, spec_.eps);
    for (const float logstd : logstds) variance_.push_back(exp(2 * double(logstd)) * sigma_src * sigma_src * sharpness);
    if (sharpness < 1) temper(float(sharpness));
  }

  std::vector<float> integrate(const std::vector<float>& state, const std::vector<double>& sigmas) const override {
    std::vector<float> end(state.size());
    std::vector<double> levels, sources(size_t(batch_), sigma_src_);
    for (const double sigma : sigmas) levels.insert(levels.end(), size_t(batch_), sigma);
    piflow_gm problem{};
    problem.batch = batch_;
    problem.num_components = spec_.num_parts;
    problem.num_channels = channels_;
    problem.pixels = pixels_;
    problem.substeps = int64_t(sigmas.size()) - 1;
    problem.means = means_.data();
    problem.logweights = logweights_.data();
    problem.x_src = x_src_.data();
    problem.x_start = state.data();
    problem.x_dst = end.data();
    problem.sigma_src = sources.data();
    problem.variance = variance_.data();
    problem.sigmas = levels.data();
    problem.eps = spec_.eps;
    check_status(piflow_gm_rollout(&problem, &options_));
    return end;
  }

 private:
  // The largest first becomes 0, so that no quotient overflows.
  void temper(float sharpness) {
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t p = 0; p < pixels_; ++p) {
        float* const first = &logweights_[size_t(b * spec_.num_parts * pixels_ + p)];
        float largest = -INFINITY;
        for (int64_t k = 0; k < spec_.num_parts; ++k) largest = std::max(largest, first[k * pixels_]);
        for (int64_t k = 0; k < spec_.num_parts; ++k) first[k * pixels_] = (first[k * pixels_] - largest) / sharpness;
      }
    }
  }

  PolicySpec spec_;
  std::vector<float> x_src_, means_, logweights_;
  std::vector<double> variance_;
  int64_t batch_, channels_, pixels_;
  double sigma_src_;
  piflow_options options_;
};

// The formulas are those of piflow_edge/policies/dx.py.
class Grid : public Policy {
 public:
  Grid(const Manifest& manifest, Arrays outputs, std::vector<float> x_src, double sigma_src, double, int num_threads)
      : spec_(manifest.policy),
        size_(manifest.latent.size()),
        x_src_(std::move(x_src)),
        sigma_src_(sigma_src),
        options_{num_threads, nullptr} {
    grid_ = take(outputs, "grid", int64_t(x_src_.size()) * spec_.num_parts);
  }

  std::vector<float> integrate(const std::vector<float>& state, const std::vector<double>& sigmas) const override {
    std::vector<float> end(state.size());
    const std::vector<double> of_one = compute_weights(sigmas);
    std::vector<double> weights;
    const int64_t batch = int64_t(state.size()) / size_;
    for (int64_t b = 0; b < batch; ++b) weights.insert(weights.end(), of_one.begin(), of_one.end());
    const piflow_dx problem{batch,        spec_.num_parts, size_,      grid_.data(),
                            x_src_.data(), state.data(),    end.data(), weights.data()};
    check_status(piflow_dx_rollout(&problem, &options_));
    return end;
  }

 private:
  // Of the state, the source and the nodes in the end of a rollout.
  std::vector<double> compute_weights(const std::vector<double>& sigmas) const {
    std::vector<double> weights(size_t(2 + spec_.num_parts));
    double left = 1;  // what is left of a state after the steps from here on
    for (size_t i = sigmas.size() - 1; i-- > 0;) {
      const double towards = (sigmas[i] - sigmas[i + 1]) / std::max(sigmas[i], spec_.eps);
      for (int64_t n = 0; n < spec_.num_parts; ++n) {
        const double share = towards * left * basis(n, sigmas[i]);
        weights[1] += share;  // x_0 = x_src - sigma_src * grid
        weights[size_t(2 + n)] -= sigma_src_ * share;
      }
      left *= 1 - towards;
    }
    weights[0] = left;
    return weights;
  }

  // The weight of a node in x_0 at a noise level.
  double basis(int64_t node, double sigma) const {
    const double src = unwarp(sigma_src_, spec_.shift), raw_t = unwarp(sigma, spec_.shift);
    if (spec_.is_polynomial) return pow(src - raw_t, double(node));
    const double dst = std::max(src - spec_.segment_size, 0.0);
    const double share = (raw_t - dst) / std::max(src - dst, spec_.eps);
    const double position = std::min(std::max(share, 0.0), 1.0) * double(spec_.num_parts - 1);
    return std::max(1 - std::abs(position - double(node)), 0.0);  // hat functions: linear interpolation
  }

  PolicySpec spec_;
  int64_t size_;
  std::vector<float> x_src_, grid_;
  double sigma_src_;
  piflow_options options_;
};

using Opener = std::unique_ptr<Policy> (*)(const Manifest&, Arrays, std::vector<float>, double, double, int);

template <class Kind>
std::unique_ptr<Policy> open(const Manifest& manifest, Arrays outputs, std::vector<float> x_src, double sigma_src,
                             double temperature, int num_threads) {
  return std::make_unique<Kind>(manifest, std::move(outputs), std::move(x_src), sigma_src, temperature, num_threads);
}

// The one registry of policies: what bundle.json calls them.
const std::map<std::string, Opener> kKinds = {{"dx", open<Grid>}, {"gm", open<Mixture>}};

}  // namespace

std::unique_ptr<Policy> open_policy(const Manifest& manifest, Arrays outputs, std::vector<float> x_src,
                                    double sigma_src, double temperature, int num_threads) {
  return kKinds.at(manifest.policy.kind)(manifest, std::move(outputs), std::move(x_src), sigma_src, temperature,
                                         num_threads);
}

}  // namespace piflow
