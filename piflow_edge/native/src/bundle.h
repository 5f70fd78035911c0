// A bundle: bundle.json, and files that are handed out only after their checksums matched. As piflow_edge/bundle.
#pragma once

#include <stdint.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "schedule.h"

namespace piflow {

struct FileSpec {
  std::string sha256;
  uint64_t size = 0;
};

struct TensorSpec {
  std::string name, dtype;
  std::vector<int64_t> shape;  // -1: a named axis
};

struct NetworkSpec {
  std::vector<TensorSpec> inputs, outputs;
  std::map<std::string, std::vector<std::string>> files;  // by precision; the first is the graph
};

// A text encoder; docs/export.md says what the fields mean. An empty input: there is none.
struct EncoderSpec {
  std::string name, hidden_input, mask_input, pooled_input;
  int64_t max_tokens = 0, pad_id = 0, drop_tokens = 0;
  bool pad_to_max = false, pad_left = false, sees_padding = false, fixed_length = false;
};

struct ConditioningSpec {
  std::string kind, input;
  int64_t num_classes = 0;
  std::vector<TensorSpec> inputs;  // of the student
  std::vector<EncoderSpec> encoders;
};

// `num_parts`: components of a mixture, nodes of a grid.
struct PolicySpec {
  std::string kind;
  int64_t num_parts = 1;
  double eps = 1e-4, segment_size = 1, shift = 1;
  bool is_polynomial = false;
};

struct LatentSpec {
  std::array<int64_t, 3> shape{};
  float scale = 1, shift = 0;
  std::vector<float> mean, deviation;
  int64_t packing = 1;

  int64_t size() const { return shape[0] * shape[1] * shape[2]; }
};

struct Manifest {
  std::string name;
  PolicySpec policy;
  ScheduleSettings schedule;
  double temperature = 1;  // NaN: as published for the number of calls
  ConditioningSpec conditioning;
  LatentSpec latent;
  bool makes_images = true;
  std::map<std::string, NetworkSpec> networks;
  std::vector<std::string> precisions;
  std::map<std::string, FileSpec> files;
};

class Bundle {
 public:
  // Reads and checks the manifest, that the folder holds what it lists and nothing else, and all checksums.
  // `expected`: SHA-256 of bundle.json, or empty.
  Bundle(const std::string& folder, const std::string& expected);

  const Manifest& manifest() const { return manifest_; }
  // Content of one file, after its size and hash matched.
  std::string read(const std::string& name) const;

 private:
  void check_listing() const;

  std::string folder_;
  Manifest manifest_;
};

}  // namespace piflow
