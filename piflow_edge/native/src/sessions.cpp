#include "sessions.h"

#include <math.h>
#include <stdlib.h>

#include <algorithm>

#include "error.h"
#include "outline.h"

namespace piflow {
namespace {

void forbid_telemetry() {
#if defined(_WIN32)
  if (getenv("ORT_DISABLE_TELEMETRY") == nullptr) _putenv_s("ORT_DISABLE_TELEMETRY", "1");
#else
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
}

// Never freed: ONNX Runtime's own threads may outlive what is freed at exit.
Ort::Env& environment() {
  static Ort::Env* const kEnvironment = [] {
    require(OrtGetApiBase()->GetApi(ORT_API_VERSION) != nullptr,
            std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                " is older than the headers that this library was built with; install a newer one");
    forbid_telemetry();
    auto* made = new Ort::Env(ORT_LOGGING_LEVEL_ERROR, "piflow_edge");
    made->DisableTelemetryEvents();
    return made;
  }();
  return *kEnvironment;
}

const std::map<std::string, ONNXTensorElementDataType> kTypes = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT}, {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64}};

Ort::Value view(const Array& array) {
  static const Ort::MemoryInfo kHost = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  if (array.integers.empty()) {
    return Ort::Value::CreateTensor<float>(kHost, const_cast<float*>(array.floats.data()), array.floats.size(),
                                           array.shape.data(), array.shape.size());
  }
  return Ort::Value::CreateTensor<int64_t>(kHost, const_cast<int64_t*>(array.integers.data()), array.integers.size(),
                                           array.shape.data(), array.shape.size());
}

bool fits(const TensorSpec& spec, const std::string& name, const Ort::TypeInfo& type) {
  if (name != spec.name || type.GetONNXType() != ONNX_TYPE_TENSOR) return false;
  const auto facts = type.GetTensorTypeAndShapeInfo();
  const auto known = kTypes.find(spec.dtype);
  const std::vector<int64_t> shape = facts.GetShape();
  if (known == kTypes.end() || facts.GetElementType() != known->second || shape.size() != spec.shape.size()) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (spec.shape[i] >= 0 && shape[i] >= 0 && shape[i] != spec.shape[i]) return false;
  }
  return true;
}

}  // namespace

int64_t count_values(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t length : shape) {
    require(length >= 0 && length <= (int64_t(1) << 40) / std::max<int64_t>(count, 1), "an array has a shape out of range");
    count *= length;
  }
  return count;
}

Session::Session(const Bundle& bundle, const std::string& name, const std::string& precision, int num_threads)
    : name_(name), spec_(bundle.manifest().networks.at(name)) {
  const auto files = spec_.files.find(precision);
  require(files != spec_.files.end() && !files->second.empty(), "the bundle has no " + name + " in " + precision);
  const std::string model = bundle.read(files->second[0]);
  std::map<std::string, uint64_t> sizes;
  std::vector<std::string> weights;
  std::vector<std::basic_string<ORTCHAR_T>> names;
  std::vector<char*> contents;
  std::vector<size_t> lengths;
  for (size_t i = 1; i < files->second.size(); ++i) {
    const std::string& file = files->second[i];
    weights.push_back(bundle.read(file));
    names.emplace_back(file.begin(), file.end());
    sizes[file] = weights.back().size();
    lengths.push_back(weights.back().size());
  }
  for (std::string& content : weights) contents.push_back(content.data());
  check_model(model, sizes);
  try {
    Ort::Env& opened = environment();
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(num_threads);
    if (!names.empty()) options.AddExternalInitializersFromFilesInMemory(names, contents, lengths);
    session_ = Ort::Session(opened, model.data(), model.size(), options);
    check_signature();
  } catch (const Ort::Exception& error) {
    throw Error("the " + name + " cannot be opened: " + error.what());
  }
}

void Session::check_signature() {
  Ort::AllocatorWithDefaultOptions allocator;
  bool is_same = session_.GetInputCount() == spec_.inputs.size() && session_.GetOutputCount() == spec_.outputs.size();
  for (size_t i = 0; is_same && i < spec_.inputs.size(); ++i) {
    is_same = fits(spec_.inputs[i], session_.GetInputNameAllocated(i, allocator).get(), session_.GetInputTypeInfo(i));
  }
  for (size_t i = 0; is_same && i < spec_.outputs.size(); ++i) {
    is_same = fits(spec_.outputs[i], session_.GetOutputNameAllocated(i, allocator).get(), session_.GetOutputTypeInfo(i));
  }
  require(is_same, "the inputs and outputs of the " + name_ + " are not those of bundle.json, or not float32 and int64");
}

Arrays Session::run(const Arrays& inputs, const Ort::RunOptions& options) const {
  std::vector<const char*> input_names, output_names;
  std::vector<Ort::Value> values;
  for (const TensorSpec& spec : spec_.inputs) {
    const auto found = inputs.find(spec.name);
    require(found != inputs.end(), "the " + name_ + " takes " + spec.name + ", which was not given");
    input_names.push_back(spec.name.c_str());
    values.push_back(view(found->second));
  }
  for (const TensorSpec& spec : spec_.outputs) output_names.push_back(spec.name.c_str());
  Arrays outputs;
  try {
    const auto made = session_.Run(options, input_names.data(), values.data(), values.size(), output_names.data(),
                                   output_names.size());
    for (size_t i = 0; i < made.size(); ++i) {
      const auto facts = made[i].GetTensorTypeAndShapeInfo();
      require(facts.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
              spec_.outputs[i].name + " of the " + name_ + " is not float32");
      Array& output = outputs[spec_.outputs[i].name];
      output.shape = facts.GetShape();
      const float* data = made[i].GetTensorData<float>();
      output.floats.assign(data, data + facts.GetElementCount());
    }
  } catch (const Ort::Exception& error) {
    throw Error("the " + name_ + " failed: " + error.what());
  }
  for (const auto& [name, output] : outputs) {
    const bool is_finite = std::all_of(output.floats.begin(), output.floats.end(), [](float x) { return isfinite(x); });
    require(is_finite, "the " + name_ + " made NaN or infinity; take another precision");
  }
  return outputs;
}

}  // namespace piflow
