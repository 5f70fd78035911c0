#include "steering.h"

#include <algorithm>

#include "error.h"

namespace piflow {
namespace {

Arrays encode_labels(const ConditioningSpec& spec, const piflow_request& request) {
  require(request.labels && !request.tokens && !request.num_arrays, "the bundle is steered by labels: give those alone");
  Array labels{{request.count}, {}, {request.labels, request.labels + request.count}};
  for (const int64_t label : labels.integers) {
    require(label >= 0 && label < spec.num_classes, "labels are ids from 0 to " + std::to_string(spec.num_classes - 1) +
                                                        "; got " + std::to_string(label));
  }
  return {{spec.input, std::move(labels)}};
}

Arrays copy_arrays(const ConditioningSpec& spec, const piflow_request& request) {
  require(request.arrays && request.num_arrays == int32_t(spec.inputs.size()) && !request.labels && !request.tokens,
          "the bundle takes " + std::to_string(spec.inputs.size()) + " arrays, and got other things; see its bundle.json");
  Arrays arrays;
  for (int32_t i = 0; i < request.num_arrays; ++i) {
    const piflow_array& given = request.arrays[i];
    require(given.name && given.data && given.shape && given.rank >= 1 && given.rank <= 8, "an array lacks a field");
    const auto input = std::find_if(spec.inputs.begin(), spec.inputs.end(),
                                    [&given](const TensorSpec& one) { return one.name == given.name; });
    const std::string name = given.name;
    require(input != spec.inputs.end(), "the student takes no array named " + name);
    Array array{{given.shape, given.shape + given.rank}, {}, {}};
    bool fits = array.shape.size() == input->shape.size() && array.shape[0] == request.count &&
                input->dtype == (given.dtype == PIFLOW_INT64 ? "int64" : "float32");
    for (size_t axis = 0; fits && axis < array.shape.size(); ++axis) {
      fits = array.shape[axis] >= 1 && (input->shape[axis] < 0 || array.shape[axis] == input->shape[axis]);
    }
    require(fits, "array " + name + " is of another type or shape than the student takes");
    const int64_t size = count_values(array.shape);
    if (given.dtype == PIFLOW_INT64) {
      const auto* data = static_cast<const int64_t*>(given.data);
      array.integers.assign(data, data + size);
    } else {
      const auto* data = static_cast<const float*>(given.data);
      array.floats.assign(data, data + size);
    }
    require(arrays.emplace(name, std::move(array)).second, "array " + name + " was given twice");
  }
  return arrays;
}

// The values of an array as they are, one after another, for either type.
template <class Visit>
void visit_values(Array& array, Visit visit) {
  visit(array.floats);
  visit(array.integers);
}

// Ids with padding, and 1 for what was said and 0 for padding.
void pad(const EncoderSpec& spec, std::vector<int64_t>& ids, std::vector<int64_t>& mask) {
  mask.assign(ids.size(), 1);
  if (!spec.pad_to_max) return;
  const size_t padding = size_t(spec.max_tokens) - ids.size();
  ids.insert(spec.pad_left ? ids.begin() : ids.end(), padding, spec.pad_id);
  mask.insert(spec.pad_left ? mask.begin() : mask.end(), padding, 0);
}

// The hidden states that the network takes: without the template's tokens; padding is 0 where the network is told of it.
Array take_hidden(const EncoderSpec& spec, const Array& hidden, const std::vector<int64_t>& said, int64_t length) {
  require(hidden.shape.size() == 3 && hidden.shape[1] == int64_t(said.size()) + spec.drop_tokens,
          "encoder " + spec.name + " has hidden states of another shape than (1, tokens, width)");
  const int64_t width = hidden.shape[2];
  Array taken{{1, length, width}, std::vector<float>(size_t(length * width)), {}};
  for (int64_t t = 0; t < std::min<int64_t>(length, int64_t(said.size())); ++t) {
    if (!said[size_t(t)] && !spec.mask_input.empty()) continue;
    const float* from = hidden.floats.data() + (t + spec.drop_tokens) * width;
    std::copy(from, from + width, taken.floats.begin() + t * width);
  }
  return taken;
}

void run_encoder(const EncoderSpec& spec, const Session& session, const ConditioningSpec& conditioning,
                 const piflow_tokens& tokens, const Ort::RunOptions& options, Arrays& fed) {
  require(tokens.ids && tokens.count > spec.drop_tokens && tokens.count <= spec.max_tokens,
          "a prompt has " + std::to_string(spec.drop_tokens + 1) + " to " + std::to_string(spec.max_tokens) +
              " tokens for encoder " + spec.name + "; got " + std::to_string(tokens.count));
  std::vector<int64_t> ids(tokens.ids, tokens.ids + tokens.count), mask;
  pad(spec, ids, mask);
  const std::vector<int64_t> shape = {1, int64_t(ids.size())};
  const std::vector<int64_t> attended = spec.sees_padding ? std::vector<int64_t>(ids.size(), 1) : mask;
  Arrays found = session.run({{"input_ids", {shape, {}, ids}}, {"attention_mask", {shape, {}, attended}}}, options);
  const std::vector<int64_t> said(mask.begin() + spec.drop_tokens, mask.end());
  const int64_t length = spec.fixed_length ? spec.max_tokens - spec.drop_tokens : int64_t(said.size());
  if (!spec.hidden_input.empty()) fed[spec.hidden_input] = take_hidden(spec, found["hidden_states"], said, length);
  if (!spec.pooled_input.empty()) fed[spec.pooled_input] = std::move(found["pooled"]);
  if (spec.mask_input.empty()) return;
  Array padded{{1, length}, {}, said};
  padded.integers.resize(size_t(length));
  for (const TensorSpec& input : conditioning.inputs) {
    if (input.name != spec.mask_input || input.dtype != "float32") continue;
    padded.floats.assign(padded.integers.begin(), padded.integers.end());
    padded.integers.clear();
  }
  fed[spec.mask_input] = std::move(padded);
}

// Encodings of several prompts as one batch; shorter ones are filled up with 0 along the tokens, the first axis.
Array join(std::vector<Array> parts) {
  Array joined;
  joined.shape = parts[0].shape;
  for (const Array& part : parts) {
    if (joined.shape.size() > 1) joined.shape[1] = std::max(joined.shape[1], part.shape[1]);
  }
  const size_t size = size_t(count_values(joined.shape));
  for (Array& part : parts) {
    visit_values(part, [size](auto& values) { values.resize(values.empty() ? 0 : size); });
    joined.floats.insert(joined.floats.end(), part.floats.begin(), part.floats.end());
    joined.integers.insert(joined.integers.end(), part.integers.begin(), part.integers.end());
  }
  joined.shape[0] = int64_t(parts.size());
  return joined;
}

Arrays encode_tokens(const ConditioningSpec& spec, const std::map<std::string, Session>& sessions,
                     const piflow_request& request, const Ort::RunOptions& options) {
  require(!request.labels && !request.num_arrays, "give tokens or arrays to a bundle that reads prompts, one of them");
  std::map<std::string, std::vector<Array>> parts;
  const piflow_tokens* tokens = request.tokens;
  for (int64_t i = 0; i < request.count; ++i) {
    Arrays fed;
    for (const EncoderSpec& encoder : spec.encoders) {
      const auto session = sessions.find("encoder." + encoder.name);
      require(session != sessions.end(), "the bundle has no encoder " + encoder.name + "; give arrays");
      run_encoder(encoder, session->second, spec, *tokens++, options, fed);
    }
    for (auto& [name, array] : fed) parts[name].push_back(std::move(array));
  }
  Arrays joined;
  for (auto& [name, arrays] : parts) joined[name] = join(std::move(arrays));
  return joined;
}

}  // namespace

Arrays encode_request(const Manifest& manifest, const std::map<std::string, Session>& sessions,
                      const piflow_request& request, const Ort::RunOptions& options) {
  const ConditioningSpec& spec = manifest.conditioning;
  if (spec.kind == "class") return encode_labels(spec, request);
  if (spec.kind == "text" && request.tokens) return encode_tokens(spec, sessions, request, options);
  if (!spec.inputs.empty()) return copy_arrays(spec, request);
  require(!request.labels && !request.tokens && !request.num_arrays, "nothing steers the images of this bundle");
  return {};
}

Arrays take_piece(const Arrays& arrays, int64_t first, int64_t count) {
  Arrays pieces;
  for (const auto& [name, array] : arrays) {
    Array piece = array;
    visit_values(piece, [&array, first, count](auto& values) {
      const int64_t size = int64_t(values.size()) / array.shape[0];
      values = std::decay_t<decltype(values)>(values.begin() + first * size, values.begin() + (first + count) * size);
    });
    piece.shape[0] = count;
    pieces[name] = std::move(piece);
  }
  return pieces;
}

}  // namespace piflow
