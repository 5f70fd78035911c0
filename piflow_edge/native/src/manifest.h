// bundle.json -> what this library needs of it, with every number in its bounds.
#pragma once

#include <string>

#include "bundle.h"

namespace piflow {

Manifest parse_manifest(const std::string& text);

}  // namespace piflow
