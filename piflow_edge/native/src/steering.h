// What steers images, as the student takes it: class labels, prompts by their tokens, or arrays made elsewhere.
#pragma once

#include <map>
#include <string>

#include "../piflow.h"
#include "bundle.h"
#include "sessions.h"

namespace piflow {

// The student's other inputs for all images of a request. `sessions`: with the text encoders.
Arrays encode_request(const Manifest& manifest, const std::map<std::string, Session>& sessions,
                      const piflow_request& request, const Ort::RunOptions& options);

// Those of some of the images.
Arrays take_piece(const Arrays& arrays, int64_t first, int64_t count);

}  // namespace piflow
