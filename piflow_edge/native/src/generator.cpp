#include "generator.h"

#include <math.h>

#include <algorithm>
#include <numeric>
#include <thread>

#include "error.h"
#include "pixels.h"
#include "steering.h"

namespace piflow {
namespace {

constexpr int64_t kBatchSize = 16;           // images that share a network call
constexpr int64_t kMostImages = 1 << 20;     // of one request
constexpr int64_t kDecodedPixels = 1 << 20;  // decoded at a time: a decoder's inner states are large

// The temperature of GM policies that the authors publish for `nfe` calls.
double published_temperature(int nfe) { return std::min(0.1 * (nfe - 1), 1.0); }

void stop_if_cancelled(const Call& call) {
  if (call.is_cancelled) throw Cancelled();
}

}  // namespace

Generator::Generator(const std::string& folder, const piflow_load_options& options)
    : bundle_(folder, options.sha256 ? options.sha256 : ""), num_threads_(options.num_threads) {
  require(num_threads_ >= 0 && num_threads_ <= 4096, "num_threads is 0 for all cores, or up to 4096");
  const Manifest& manifest = bundle_.manifest();
  const std::string precision = options.precision ? options.precision : manifest.precisions[0];
  require(std::count(manifest.precisions.begin(), manifest.precisions.end(), precision),
          "the bundle holds no precision " + precision + "; its first is " + manifest.precisions[0]);
  for (const auto& [name, spec] : manifest.networks) {
    const bool is_needed = name == "student" || name == "decoder" || name.rfind("encoder.", 0) == 0;
    if (is_needed) sessions_.try_emplace(name, bundle_, name, precision, num_threads_);
  }
}

void Generator::check(const piflow_request& request) const {
  require(request.count >= 1 && request.count <= kMostImages, "count is 1 to 1048576 images of one request");
  require(request.nfe >= 0 && request.nfe <= 1000, "nfe is 1 to 1000 network calls, or 0 for the bundle's");
  require(request.substeps >= 0 && request.substeps <= 1000000, "substeps is 1 to 1000000, or 0 for the bundle's");
  require(bundle_.manifest().makes_images, "the bundle makes latents and has no decoder; export it with --autoencoder");
}

Images Generator::make(const piflow_request& request) {
  check(request);
  Call call;
  struct Registered {
    Generator& generator;
    Call& call;
    Registered(Generator& owner, Call& one) : generator(owner), call(one) {
      std::lock_guard lock(generator.mutex_);
      generator.calls_.insert(&call);
    }
    ~Registered() {
      std::lock_guard lock(generator.mutex_);
      generator.calls_.erase(&call);
    }
  } registered(*this, call);
  try {
    const Arrays steering = encode_request(bundle_.manifest(), sessions_, request, call.options);
    const int64_t pieces = (request.count + kBatchSize - 1) / kBatchSize;
    Images images;
    for (int64_t piece = 0, first = 0; piece < pieces; ++piece) {
      const int64_t stop = ((piece + 1) * request.count + pieces - 1) / pieces, count = stop - first;
      append(images, decode(draw(request, first, count, take_piece(steering, first, count), call), call));
      first = stop;
    }
    return images;
  } catch (const Cancelled&) {
    throw;
  } catch (const Error&) {
    stop_if_cancelled(call);  // then the network failed because of that
    throw;
  }
}

std::vector<float> Generator::draw(const piflow_request& request, int64_t first, int64_t count,
                                   const Arrays& steering, const Call& call) const {
  const Manifest& manifest = bundle_.manifest();
  ScheduleSettings settings = manifest.schedule;
  if (request.nfe) settings.nfe = request.nfe;
  if (request.substeps) settings.total_substeps = request.substeps;
  const double temperature = isnan(manifest.temperature) ? published_temperature(settings.nfe) : manifest.temperature;
  const std::vector<Segment> segments = plan_segments(settings);
  const auto& [channels, height, width] = manifest.latent.shape;
  std::vector<float> state = draw_noise(request, first, count, 0);
  for (size_t i = 0; i < segments.size(); ++i) {
    stop_if_cancelled(call);
    const Segment& segment = segments[i];
    Arrays inputs = steering;
    inputs["x_t"] = {{count, channels, height, width}, state, {}};
    inputs["t"] = {{count}, std::vector<float>(size_t(count), float(segment.sigmas[0])), {}};
    Arrays outputs = sessions_.at("student").run(inputs, call.options);
    const double sharpness = i + 1 < segments.size() ? temperature : 1;
    const auto policy = open_policy(manifest, std::move(outputs), state, segment.sigmas[0], sharpness, num_threads_);
    state = policy->integrate(state, segment.sigmas);
    const double sigma_t = segment.sigmas.back();
    if (request.callback) {
      const Trajectory trajectory{*this, call, *policy, state, sigma_t};
      const piflow_progress progress{first, count, int32_t(i + 1), settings.nfe, sigma_t, &trajectory};
      if (request.callback(request.context, &progress)) throw Cancelled();
    }
    if (!segment.renoise) continue;
    const std::vector<float> fresh = draw_noise(request, first, count, uint32_t(i + 1));
    const float kept = float(segment.renoise->first), added = float(segment.renoise->second);
    for (size_t at = 0; at < state.size(); ++at) state[at] = kept * state[at] + added * fresh[at];
  }
  stop_if_cancelled(call);
  const bool is_finite = std::all_of(state.begin(), state.end(), [](float x) { return isfinite(x); });
  require(is_finite, "the policy made NaN or infinity; take another precision");
  return state;
}

std::vector<float> Generator::draw_noise(const piflow_request& request, int64_t first, int64_t count,
                                         uint32_t draw) const {
  std::vector<uint64_t> indices(static_cast<size_t>(count));
  std::iota(indices.begin(), indices.end(), uint64_t(first));
  std::vector<float> normals(size_t(count * bundle_.manifest().latent.size()));
  const piflow_noise problem{count, bundle_.manifest().latent.size(), request.seed, indices.data(), draw, normals.data()};
  const piflow_options options{num_threads_, nullptr};
  require(piflow_normal(&problem, &options) == PIFLOW_OK, "the noise could not be drawn; is memory short?");
  return normals;
}

Images Generator::decode(std::vector<float> latents, const Call& call) const {
  const LatentSpec& spec = bundle_.manifest().latent;
  Array restored = restore(latents, spec);
  const auto decoder = sessions_.find("decoder");
  Images images;
  if (decoder == sessions_.end()) {
    images = to_pixels(restored);
  } else {
    const NetworkSpec& network = decoder->second.spec();
    require(network.inputs.size() == 1 && network.outputs.size() == 1, "the decoder takes or gives other than one array");
    const int64_t count = restored.shape[0], pixels = restored.shape[2] * restored.shape[3];
    const int64_t together = std::max<int64_t>(kDecodedPixels / (64 * pixels), 1);  // 8 pixels a side for a latent
    for (int64_t first = 0; first < count; first += together) {
      const Arrays piece = take_piece({{network.inputs[0].name, restored}}, first, std::min(together, count - first));
      append(images, to_pixels(decoder->second.run(piece, call.options).at(network.outputs[0].name)));
    }
  }
  images.latents = std::move(latents);
  return images;
}

void Generator::cancel() {
  std::lock_guard lock(mutex_);
  for (Call* call : calls_) {
    call->is_cancelled = true;
    call->options.SetTerminate();
  }
}

}  // namespace piflow
