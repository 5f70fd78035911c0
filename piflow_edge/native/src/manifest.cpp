#include "manifest.h"

#include <math.h>

#include <nlohmann/json.hpp>
#include <set>

#include "error.h"
#include "sha256.h"

namespace piflow {
namespace {

using nlohmann::json;

constexpr int kFormat = 5;
constexpr int64_t kLargest = int64_t(1) << 28;  // numbers in one image's latents
const double kInfinity = INFINITY;

// The last lines of a manifest are its own checksum, which is that of everything else.
void check_own_sum(const std::string& text) {
  const std::string before = ",\n  \"sha256\": \"", after = "\"\n}\n";
  const size_t size = before.size() + 64 + after.size();
  const std::string again = "bundle.json does not match its own checksum; copy the bundle again";
  require(text.size() > size, again);
  const std::string rest = text.substr(0, text.size() - size), end = text.substr(rest.size());
  require(end == before + sha256(rest + "\n}\n") + after, again);
}

// A key that stands twice would be read in two ways.
json parse_json(const std::string& text) {
  std::vector<std::set<std::string>> keys;
  return json::parse(text, [&keys](int depth, json::parse_event_t event, json& value) {
    require(depth < 32, "bundle.json is nested too deep");
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key) {
      require(keys.back().insert(value.get<std::string>()).second, "bundle.json has the key " + value.dump() + " twice");
    }
    return true;
  });
}

double read_number(const json& object, const char* name, double least, double most) {
  const double value = object.at(name).get<double>();
  require(value >= least && value <= most, std::string("bundle.json has a number out of range: ") + name);
  return value;
}

int64_t read_count(const json& object, const char* name, int64_t least, int64_t most) {
  const json& value = object.at(name);
  require(value.is_number_integer(), std::string("bundle.json should have a whole number as ") + name);
  return int64_t(read_number(object, name, double(least), double(most)));
}

std::string read_text_or_nothing(const json& object, const char* name) {
  const json& value = object.at(name);
  return value.is_null() ? "" : value.get<std::string>();
}

std::vector<TensorSpec> read_tensors(const json& list) {
  std::vector<TensorSpec> tensors;
  for (const json& one : list) {
    TensorSpec tensor{one.at("name"), one.at("dtype"), {}};
    for (const json& length : one.at("shape")) tensor.shape.push_back(length.is_string() ? -1 : length.get<int64_t>());
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

PolicySpec read_policy(const json& described) {
  PolicySpec policy;
  policy.kind = described.at("kind");
  require(policy.kind == "gm" || policy.kind == "dx",
          "this library integrates policies gm and dx; the bundle has '" + policy.kind + "'");
  policy.eps = read_number(described, "eps", 1e-12, 1);
  policy.num_parts = read_count(described, policy.kind == "gm" ? "num_components" : "num_nodes", 1, 1024);
  if (policy.kind == "dx") {
    policy.segment_size = read_number(described, "segment_size", 1e-9, 1e9);
    policy.shift = read_number(described, "shift", 1e-9, 1e9);
    policy.is_polynomial = described.at("mode") == "polynomial";
  }
  return policy;
}

ScheduleSettings read_schedule(const json& described) {
  ScheduleSettings schedule;
  schedule.nfe = int(read_count(described, "nfe", 1, 1000));
  schedule.shift = read_number(described, "shift", 1e-9, 1e9);
  schedule.final_step_size_scale = read_number(described, "final_step_size_scale", 1e-9, 1e9);
  schedule.total_substeps = int(read_count(described, "total_substeps", 1, 1000000));
  schedule.h = described.at("h") == "inf" ? kInfinity : read_number(described, "h", 0, 1e9);
  schedule.rounds_up = described.value("substep_rule", "round") == "ceil";
  return schedule;
}

EncoderSpec read_encoder(const json& described) {
  EncoderSpec encoder;
  encoder.name = described.at("name");
  encoder.hidden_input = read_text_or_nothing(described, "hidden_input");
  encoder.mask_input = read_text_or_nothing(described, "mask_input");
  encoder.pooled_input = read_text_or_nothing(described, "pooled_input");
  encoder.max_tokens = read_count(described, "max_tokens", 1, 1 << 20);
  encoder.pad_id = read_count(described, "pad_id", 0, 1 << 30);
  encoder.drop_tokens = read_count(described, "drop_tokens", 0, encoder.max_tokens - 1);
  encoder.pad_to_max = described.at("pad_to_max");
  encoder.pad_left = described.at("pad_left");
  encoder.sees_padding = described.at("sees_padding");
  encoder.fixed_length = described.at("fixed_length");
  return encoder;
}

ConditioningSpec read_conditioning(const json& described, const NetworkSpec& student) {
  ConditioningSpec conditioning;
  conditioning.kind = described.at("kind");
  for (const TensorSpec& input : student.inputs) {
    if (input.name != "x_t" && input.name != "t") conditioning.inputs.push_back(input);
  }
  if (conditioning.kind == "class") {
    conditioning.input = described.at("input");
    conditioning.num_classes = int64_t(described.at("names").size());
  }
  if (conditioning.kind == "text") {
    for (const json& encoder : described.at("encoders")) conditioning.encoders.push_back(read_encoder(encoder));
  }
  return conditioning;
}

LatentSpec read_latent(const json& described) {
  LatentSpec latent;
  int64_t size = 1;
  require(described.at("shape").size() == 3, "bundle.json should have three lengths as the shape of latents");
  for (int i = 0; i < 3; ++i) {
    latent.shape[i] = described.at("shape")[i].get<int64_t>();
    require(latent.shape[i] >= 1 && latent.shape[i] <= kLargest / size, "bundle.json has latents out of range");
    size *= latent.shape[i];
  }
  latent.scale = float(read_number(described, "scale", -1e9, 1e9));
  latent.shift = float(read_number(described, "shift", -1e9, 1e9));
  require(latent.scale != 0, "bundle.json scales latents by 0");
  latent.mean = described.at("mean").get<std::vector<float>>();
  latent.deviation = described.at("deviation").get<std::vector<float>>();
  const bool is_whole = latent.mean.empty() || int64_t(latent.mean.size()) == latent.shape[0];
  require(is_whole && latent.mean.size() == latent.deviation.size(), "bundle.json has no mean for some channels");
  latent.packing = read_count(described, "packing", 1, 64);
  require(latent.shape[0] % (latent.packing * latent.packing) == 0, "bundle.json packs channels that are no squares");
  return latent;
}

std::map<std::string, FileSpec> read_files(const json& described) {
  std::map<std::string, FileSpec> files;
  for (const auto& [name, spec] : described.items()) {
    require(!name.empty() && name != "." && name != ".." && name.find_first_of(std::string("/\\:\0", 4)) == name.npos,
            "bundle.json lists a file outside its folder: " + name);
    files[name] = {spec.at("sha256"), spec.at("size").get<uint64_t>()};
  }
  return files;
}

Manifest read_manifest(const json& root) {
  require(root.at("format_version") == kFormat, "bundle.json has format version " + root.at("format_version").dump() +
                                                    ", this library reads 5; export it again");
  Manifest manifest;
  manifest.name = root.at("name");
  for (const auto& [name, spec] : root.at("networks").items()) {
    manifest.networks[name] = {read_tensors(spec.at("inputs")), read_tensors(spec.at("outputs")), spec.at("files")};
  }
  require(manifest.networks.count("student"), "bundle.json lists no student");
  manifest.policy = read_policy(root.at("policy"));
  manifest.schedule = read_schedule(root.at("schedule"));
  const json& temperature = root.at("schedule").at("temperature");
  manifest.temperature = temperature == "auto" ? NAN : read_number(root.at("schedule"), "temperature", 0, 1e9);
  manifest.conditioning = read_conditioning(root.at("conditioning"), manifest.networks.at("student"));
  manifest.latent = read_latent(root.at("latent"));
  manifest.makes_images = root.at("latent").at("kind") == "pixels" || manifest.networks.count("decoder");
  manifest.precisions = root.at("precisions").get<std::vector<std::string>>();
  require(!manifest.precisions.empty(), "bundle.json lists no precision");
  manifest.files = read_files(root.at("files"));
  return manifest;
}

}  // namespace

Manifest parse_manifest(const std::string& text) {
  try {
    const json root = parse_json(text);
    check_own_sum(text);
    return read_manifest(root);
  } catch (const json::exception& error) {
    throw Error(std::string("bundle.json is not as this library reads it: ") + error.what());
  }
}

}  // namespace piflow
