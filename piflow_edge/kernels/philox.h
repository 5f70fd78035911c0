// Philox4x32-10 and Box-Muller; piflow_edge/noise.py says which words make which numbers.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#ifndef PIFLOW_PHILOX_H
#define PIFLOW_PHILOX_H

#include <array>
#include <cmath>
#include <cstdint>

namespace piflow {

using Words = std::array<uint32_t, 4>;
using Normals = std::array<float, 4>;

inline Words philox(uint32_t block, uint32_t draw, uint64_t index, uint64_t seed) {
  Words x = {block, draw, uint32_t(index), uint32_t(index >> 32)};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * x[0], b = uint64_t(0xCD9E8D57) * x[2];
    x = {uint32_t(b >> 32) ^ x[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ key1, uint32_t(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return x;
}

// In double, rounded once: libraries differ in the last bit of a float's logarithm.
inline Normals normals_of(const Words& words) {
  constexpr double kTurn = 6.283185307179586;
  const auto uniform = [](uint32_t word) { return (double(word >> 8) + 0.5) * 0x1p-24; };
  Normals normals;
  for (size_t i = 0; i < 4; i += 2) {
    const double radius = std::sqrt(-2 * std::log(uniform(words[i])));
    const double angle = kTurn * uniform(words[i + 1]);
    normals[i] = float(std::cos(angle) * radius);
    normals[i + 1] = float(std::sin(angle) * radius);
  }
  return normals;
}

}  // namespace piflow

#endif
