// Philox4x32-10 and Box-Muller; piflow_edge/noise.py says which words make which numbers, and by which operations.
// Plain loops over a few blocks at a time, which compilers turn into vectors. In an unnamed namespace, as lanes.h.
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
#pragma once

#include "clib.h"

namespace piflow {
namespace {

constexpr int kLockstep = 32;  // blocks

// Of consecutive blocks: word j of block i is words[j][i].
struct Words {
  uint32_t at[4][kLockstep];
};

inline void philox(uint32_t first, uint32_t draw, uint64_t index, uint64_t seed, Words& words) {
  auto& x = words.at;
  for (int i = 0; i < kLockstep; ++i) {
    x[0][i] = first + uint32_t(i);
    x[1][i] = draw;
    x[2][i] = uint32_t(index);
    x[3][i] = uint32_t(index >> 32);
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLockstep; ++i) {
      const uint64_t a = uint64_t(0xD2511F53) * x[0][i], b = uint64_t(0xCD9E8D57) * x[2][i];
      x[0][i] = uint32_t(b >> 32) ^ x[1][i] ^ key0;
      x[2][i] = uint32_t(a >> 32) ^ x[3][i] ^ key1;
      x[1][i] = uint32_t(b);
      x[3][i] = uint32_t(a);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

inline uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double double_of(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// By Horner's rule, the highest power's coefficient first; written out, so that loops over it become vectors.
template <class... Coefficients>
inline double polynomial(double x, double value, Coefficients... lower) {
  ((value = value * x + lower), ...);
  return value;
}

// sqrt(-2 ln u), u = (k + 0.5) / 2^24
inline double radius_of(uint32_t word) {
  constexpr double kLn2 = 0.6931471805599453, kRootHalf = 0.7071067811865476;
  const uint64_t bits = bits_of((double(int32_t(word >> 8)) + 0.5) * 0x1p-24);
  // u = 2^exponent m, m from kRootHalf up; the exponent, 64 added to keep it above 0, becomes a double as the last bits
  // of 2^52.
  const uint64_t exponent = (bits - bits_of(kRootHalf) + (uint64_t(64) << 52)) >> 52;
  const double m = double_of(bits - ((exponent - 64) << 52));
  const double power = double_of(exponent | bits_of(0x1p52)) - (0x1p52 + 64);
  const double s = (m - 1) / (m + 1), z = s * s;
  const double sum = polynomial(z, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7,
                                1.0 / 5, 1.0 / 3, 1.0);
  return sqrt(-2 * (power * kLn2 + 2 * s * sum));
}

// cos and sin of 2 pi v, v = (k + 0.5) / 2^24: of the rest of a quarter turn, -0.5 to 0.5, then turned.
inline void turned(uint32_t word, double& cosine, double& sine) {
  constexpr double kQuarter = 1.5707963267948966;
  const int32_t k = int32_t(word >> 8), quarter = (k + (1 << 21)) >> 22;
  const double x = (double(k - (quarter << 22)) + 0.5) * 0x1p-22 * kQuarter, z = x * x;
  const double c = polynomial(z, -1.0 / 6402373705728000 /* 18! */, 1.0 / 20922789888000, -1.0 / 87178291200,
                              1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24, -1.0 / 2, 1.0);
  const double s = x * polynomial(z, 1.0 / 355687428096000 /* 17! */, -1.0 / 1307674368000, 1.0 / 6227020800,
                                  -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6, 1.0);
  const uint64_t odd = uint64_t(0) - uint64_t(quarter & 1);
  const uint64_t swap = (bits_of(c) ^ bits_of(s)) & odd;
  cosine = double_of(bits_of(c) ^ swap ^ (uint64_t((quarter + 1) & 2) << 62));
  sine = double_of(bits_of(s) ^ swap ^ (uint64_t(quarter & 2) << 62));
}

// `size` normals of one image and draw, from block `first` on.
inline void philox_normals(uint64_t seed, uint64_t index, uint32_t draw, uint32_t first, int64_t size, float* normals) {
  for (; size > 0; first += kLockstep, normals += 4 * kLockstep, size -= 4 * kLockstep) {
    Words words;
    philox(first, draw, index, seed, words);
    float made[kLockstep][4];
    for (int pair = 0; pair < 2; ++pair) {
      double radius[kLockstep], cosine[kLockstep], sine[kLockstep];
      for (int i = 0; i < kLockstep; ++i) radius[i] = radius_of(words.at[2 * pair][i]);
      for (int i = 0; i < kLockstep; ++i) turned(words.at[2 * pair + 1][i], cosine[i], sine[i]);
      for (int i = 0; i < kLockstep; ++i) {
        made[i][2 * pair] = float(cosine[i] * radius[i]);
        made[i][2 * pair + 1] = float(sine[i] * radius[i]);
      }
    }
    memcpy(normals, made, sizeof(float) * size_t(size < 4 * kLockstep ? size : 4 * kLockstep));
  }
}

}  // namespace
}  // namespace piflow
