#include "outline.h"

#include <functional>
#include <set>
#include <utility>

#include "error.h"

namespace piflow {
namespace {

constexpr int kDeepest = 8;       // real graphs nest two deep
constexpr uint64_t kExternal = 1;  // TensorProto.DataLocation

// One field of a protobuf message: a number, or bytes.
struct Field {
  uint64_t number = 0, value = 0;
  std::string_view bytes;
  bool has_bytes = false;

  std::string_view content() const {
    require(has_bytes, "the network is not a whole ONNX model: a field has another type; export again");
    return bytes;
  }
};

class Message {
 public:
  explicit Message(std::string_view data) : rest_(data) {}

  bool next(Field& field) {
    if (rest_.empty()) return false;
    const uint64_t tag = varint(), kind = tag & 7;
    field = {tag >> 3, 0, {}, kind == 2};
    if (kind == 0) field.value = varint();
    else if (kind == 1) take(8);
    else if (kind == 2) field.bytes = take(varint());
    else if (kind == 5) take(4);
    else throw Error("the network is not a whole ONNX model: a field has no known type; export again");
    return true;
  }

 private:
  std::string_view take(uint64_t size) {
    require(size <= rest_.size(), "the network is not a whole ONNX model: it ends too soon; export again");
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= uint64_t(byte & 0x7f) << shift;
      if (byte < 0x80) return value;
    }
    throw Error("the network is not a whole ONNX model: a number is too long; export again");
  }

  std::string_view rest_;
};

// What may stand once: of two, one reader takes the first and another the last, or their union.
template <class Value>
void set_once(bool& is_set, Value& place, Value value) {
  require(!is_set, "the network says one thing twice, so that it can be read in two ways; export again");
  is_set = true;
  place = value;
}

using Operator = std::pair<std::string, std::string>;  // domain and name

const std::set<std::string> kDomains = {"", "ai.onnx", "com.microsoft"};
const std::set<std::string> kRefused = {"EPContext", "PythonOp", "PythonOpGrad", "Snpe", "TritonOp"};

// Numbers of fields are those of onnx.proto.
class Walk {
 public:
  explicit Walk(const std::map<std::string, uint64_t>& files) : files_(files) {}

  void model(std::string_view data) {
    Message message(data);
    bool has_graph = false;
    std::string_view main;
    for (Field field; message.next(field);) {
      if (field.number == 7) set_once(has_graph, main, field.content());
      if (field.number == 20) training(field.content());
      if (field.number == 25) function(field.content());
    }
    require(has_graph, "the network's file holds no graph; export again");
    graph(main, 1, true);
    for (const Operator& used : operators_) check_operator(used);
  }

 private:
  void check_operator(const Operator& used) const {
    const auto& [domain, name] = used;
    require(functions_.count(used) || kDomains.count(domain),
            "the network uses the operator '" + name + "' of the domain '" + domain +
                "'; operators are of the standard or of com.microsoft: export the network with those");
    require(domain != "com.microsoft" || !kRefused.count(name),
            "the network uses the operator '" + name + "', which runs code or a compiled engine; export the network itself");
  }

  void training(std::string_view data) {
    Message message(data);
    for (Field field; message.next(field);) {
      if (field.number == 1 || field.number == 2) graph(field.content(), 1, false);
    }
  }

  void function(std::string_view data) {
    Message message(data);
    bool has_name = false, has_domain = false;
    std::string_view name, domain;
    for (Field field; message.next(field);) {
      if (field.number == 1) set_once(has_name, name, field.content());
      if (field.number == 7) node(field.content(), 1);
      if (field.number == 10) set_once(has_domain, domain, field.content());
      if (field.number == 11) attribute(field.content(), 1);
    }
    functions_.emplace(domain, name);
    operators_.emplace(domain == "com.microsoft" ? domain : "", name);  // a refused name stays one
  }

  void graph(std::string_view data, int depth, bool is_main) {
    require(depth <= kDeepest, "the network's graphs are nested too deep; export again");
    Message message(data);
    for (Field field; message.next(field);) {
      if (field.number == 1) node(field.content(), depth);
      if (field.number == 5) tensor(field.content(), is_main);
      if (field.number == 15) sparse(field.content());
    }
  }

  void node(std::string_view data, int depth) {
    Message message(data);
    bool has_name = false, has_domain = false;
    std::string_view name, domain;
    for (Field field; message.next(field);) {
      if (field.number == 4) set_once(has_name, name, field.content());
      if (field.number == 5) attribute(field.content(), depth);
      if (field.number == 7) set_once(has_domain, domain, field.content());
    }
    operators_.emplace(domain, name);
  }

  // All of it, whatever the attribute says of its type.
  void attribute(std::string_view data, int depth) {
    Message message(data);
    for (Field field; message.next(field);) {
      if (field.number == 5 || field.number == 10) tensor(field.content(), false);
      if (field.number == 6 || field.number == 11) graph(field.content(), depth + 1, false);
      if (field.number == 22 || field.number == 23) sparse(field.content());
    }
  }

  void sparse(std::string_view data) {
    Message message(data);
    for (Field field; message.next(field);) {
      if (field.number == 1 || field.number == 2) tensor(field.content(), false);
    }
  }

  void tensor(std::string_view data, bool is_weight) {
    Message message(data);
    bool has_place = false, has_location = false;
    uint64_t location = 0;
    std::map<std::string, std::string> place;
    for (Field field; message.next(field);) {
      if (field.number == 13) {
        has_place = true;
        entry(field.content(), place);
      }
      if (field.number == 14) set_once(has_location, location, field.value);
    }
    if (!has_place && location == 0) return;
    require(has_place && location == kExternal,
            "a weight says both that its values are in the network's file and that they are not; export again");
    check_place(place, is_weight);
  }

  void entry(std::string_view data, std::map<std::string, std::string>& place) const {
    Message message(data);
    bool has_key = false, has_value = false;
    std::string_view key, value;
    for (Field field; message.next(field);) {
      if (field.number == 1) set_once(has_key, key, field.content());
      if (field.number == 2) set_once(has_value, value, field.content());
    }
    require(place.emplace(key, value).second, "the place of a weight says one thing twice; export again");
  }

  void check_place(std::map<std::string, std::string>& place, bool is_weight) const {
    const auto file = files_.find(place["location"]);
    require(file != files_.end(), "a weight lies in the file '" + place["location"] +
                                      "', which did not come with the network; export again");
    require(is_weight, "only weights of the main graph may lie in a file beside it; export again");
    const uint64_t offset = count(place["offset"]), length = count(place["length"]);
    require(offset <= file->second && length <= file->second - offset,
            "a weight lies beyond the end of the file '" + file->first + "'; export again");
  }

  static uint64_t count(const std::string& text) {
    require(text.size() < 19 && text.find_first_not_of("0123456789") == std::string::npos,
            "a weight has no place in its file: got '" + text.substr(0, 40) + "'; export again");
    return text.empty() ? 0 : std::stoull(text);
  }

  const std::map<std::string, uint64_t>& files_;
  std::set<Operator> operators_, functions_;
};

}  // namespace

void check_model(std::string_view model, const std::map<std::string, uint64_t>& files) {
  // ONNX Runtime would read it as its own format, whatever else it is.
  require(model.size() < 8 || model.substr(4, 4) != "ORTM", "the network is in ONNX Runtime's own format; export it as ONNX");
  Walk(files).model(model);
}

}  // namespace piflow
