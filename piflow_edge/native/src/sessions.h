// Networks, opened in ONNX Runtime.
#pragma once

#include <onnxruntime_cxx_api.h>
#include <stdint.h>

#include <map>
#include <string>
#include <vector>

#include "bundle.h"

namespace piflow {

// An array in host memory: `floats` or `integers` holds its values.
struct Array {
  std::vector<int64_t> shape;
  std::vector<float> floats;
  std::vector<int64_t> integers;
};

using Arrays = std::map<std::string, Array>;

int64_t count_values(const std::vector<int64_t>& shape);

// One opened network. Several threads may run it at the same time.
class Session {
 public:
  // `num_threads`: 0 for one each core.
  Session(const Bundle& bundle, const std::string& name, const std::string& precision, int num_threads);

  // One call. Outputs are float32 and finite. `options` can end it from another thread.
  Arrays run(const Arrays& inputs, const Ort::RunOptions& options) const;

  const NetworkSpec& spec() const { return spec_; }

 private:
  void check_signature();

  std::string name_;
  NetworkSpec spec_;
  mutable Ort::Session session_{nullptr};
};

}  // namespace piflow
