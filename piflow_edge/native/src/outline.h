// What an ONNX file reaches for, read before an engine opens it, which follows whatever a graph says: files that it
// keeps weights in, and operators. As piflow_edge/system/onnx_outline.py.
#pragma once

#include <stdint.h>

#include <map>
#include <string>
#include <string_view>

namespace piflow {

// Refuses a model that keeps weights elsewhere than in `files` (sizes in bytes by name), that uses operators of unknown
// domains or such as run code, or that can be read in two ways.
void check_model(std::string_view model, const std::map<std::string, uint64_t>& files);

}  // namespace piflow
