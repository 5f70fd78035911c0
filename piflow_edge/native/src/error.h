// Errors, as sentences: what holds, what came, what to do. They leave the library through piflow_last_error().
#pragma once

#include <stdexcept>
#include <string>

namespace piflow {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Cancelled : Error {
  Cancelled() : Error("cancelled, as was asked for") {}
};

inline void require(bool holds, const std::string& message) {
  if (!holds) throw Error(message);
}

}  // namespace piflow
