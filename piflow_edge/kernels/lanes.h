// Vectors of float, the same few operations for every instruction set; the compiler's flags choose which.
//
// `Lanes` is one register. `Scalar` is one number: what a CUDA thread uses, and a CPU without a vector unit
// known here. All round alike, but for `fma`, which rounds twice where the instruction set has none (x86-64
// baseline, WebAssembly).
//
// Everything lies in an unnamed namespace: this header is compiled once per instruction set into one library,
// and the linker must not merge a function built for AVX-512 with its baseline twin.
#pragma once

#if defined(__CUDACC__)
#define PIFLOW_FN __device__ __forceinline__
#elif defined(_MSC_VER)
#define PIFLOW_FN __forceinline
#else
#define PIFLOW_FN inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
// A thread is the lane.
#elif defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__wasm_simd128__)
#include <wasm_simd128.h>
#endif
#if !defined(__CUDACC__)
#include "clib.h"
#endif

namespace piflow {
namespace {

struct Scalar {
  static constexpr int width = 1, registers = 32;
  float v;
  static PIFLOW_FN Scalar splat(float x) { return {x}; }
  static PIFLOW_FN Scalar load(const float* p) { return {*p}; }
  PIFLOW_FN void store(float* p) const { *p = v; }
};
PIFLOW_FN Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
PIFLOW_FN Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
PIFLOW_FN Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
PIFLOW_FN Scalar operator/(Scalar a, Scalar b) { return {a.v / b.v}; }
PIFLOW_FN Scalar fma(Scalar a, Scalar b, Scalar c) { return {::fmaf(a.v, b.v, c.v)}; }
PIFLOW_FN Scalar max_or_second(Scalar a, Scalar b) { return {a.v > b.v ? a.v : b.v}; }
PIFLOW_FN Scalar shifted_to_exponent(Scalar a) {
#if defined(__CUDACC__)
  return {__uint_as_float(__float_as_uint(a.v) << 23)};
#else
  uint32_t bits;
  memcpy(&bits, &a.v, sizeof bits);
  bits <<= 23;
  memcpy(&a.v, &bits, sizeof bits);
  return a;
#endif
}

#if defined(__CUDACC__)
using Lanes = Scalar;

#elif defined(__AVX512F__)
struct Lanes {
  static constexpr int width = 16, registers = 32;
  __m512 v;
  static PIFLOW_FN Lanes splat(float x) { return {_mm512_set1_ps(x)}; }
  static PIFLOW_FN Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
  PIFLOW_FN void store(float* p) const { _mm512_storeu_ps(p, v); }
};
PIFLOW_FN Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
PIFLOW_FN Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PIFLOW_FN Lanes max_or_second(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
PIFLOW_FN Lanes shifted_to_exponent(Lanes a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}

#elif defined(__AVX2__) && defined(__FMA__)
struct Lanes {
  static constexpr int width = 8, registers = 16;
  __m256 v;
  static PIFLOW_FN Lanes splat(float x) { return {_mm256_set1_ps(x)}; }
  static PIFLOW_FN Lanes load(const float* p) { return {_mm256_loadu_ps(p)}; }
  PIFLOW_FN void store(float* p) const { _mm256_storeu_ps(p, v); }
};
PIFLOW_FN Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.v, b.v)}; }
PIFLOW_FN Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PIFLOW_FN Lanes max_or_second(Lanes a, Lanes b) { return {_mm256_max_ps(a.v, b.v)}; }
PIFLOW_FN Lanes shifted_to_exponent(Lanes a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}

#elif defined(__SSE2__) || defined(_M_X64)
struct Lanes {
  static constexpr int width = 4, registers = 16;
  __m128 v;
  static PIFLOW_FN Lanes splat(float x) { return {_mm_set1_ps(x)}; }
  static PIFLOW_FN Lanes load(const float* p) { return {_mm_loadu_ps(p)}; }
  PIFLOW_FN void store(float* p) const { _mm_storeu_ps(p, v); }
};
PIFLOW_FN Lanes operator+(Lanes a, Lanes b) { return {_mm_add_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator-(Lanes a, Lanes b) { return {_mm_sub_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator*(Lanes a, Lanes b) { return {_mm_mul_ps(a.v, b.v)}; }
PIFLOW_FN Lanes operator/(Lanes a, Lanes b) { return {_mm_div_ps(a.v, b.v)}; }
PIFLOW_FN Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
PIFLOW_FN Lanes max_or_second(Lanes a, Lanes b) { return {_mm_max_ps(a.v, b.v)}; }
PIFLOW_FN Lanes shifted_to_exponent(Lanes a) {
  return {_mm_castsi128_ps(_mm_slli_epi32(_mm_castps_si128(a.v), 23))};
}

#elif defined(__aarch64__)
struct Lanes {
  static constexpr int width = 4, registers = 32;
  float32x4_t v;
  static PIFLOW_FN Lanes splat(float x) { return {vdupq_n_f32(x)}; }
  static PIFLOW_FN Lanes load(const float* p) { return {vld1q_f32(p)}; }
  PIFLOW_FN void store(float* p) const { vst1q_f32(p, v); }
};
PIFLOW_FN Lanes operator+(Lanes a, Lanes b) { return {vaddq_f32(a.v, b.v)}; }
PIFLOW_FN Lanes operator-(Lanes a, Lanes b) { return {vsubq_f32(a.v, b.v)}; }
PIFLOW_FN Lanes operator*(Lanes a, Lanes b) { return {vmulq_f32(a.v, b.v)}; }
PIFLOW_FN Lanes operator/(Lanes a, Lanes b) { return {vdivq_f32(a.v, b.v)}; }
PIFLOW_FN Lanes fma(Lanes a, Lanes b, Lanes c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
PIFLOW_FN Lanes max_or_second(Lanes a, Lanes b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
PIFLOW_FN Lanes shifted_to_exponent(Lanes a) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v), 23))};
}

#elif defined(__wasm_simd128__)
struct Lanes {
  static constexpr int width = 4, registers = 16;
  v128_t v;
  static PIFLOW_FN Lanes splat(float x) { return {wasm_f32x4_splat(x)}; }
  static PIFLOW_FN Lanes load(const float* p) { return {wasm_v128_load(p)}; }
  PIFLOW_FN void store(float* p) const { wasm_v128_store(p, v); }
};
PIFLOW_FN Lanes operator+(Lanes a, Lanes b) { return {wasm_f32x4_add(a.v, b.v)}; }
PIFLOW_FN Lanes operator-(Lanes a, Lanes b) { return {wasm_f32x4_sub(a.v, b.v)}; }
PIFLOW_FN Lanes operator*(Lanes a, Lanes b) { return {wasm_f32x4_mul(a.v, b.v)}; }
PIFLOW_FN Lanes operator/(Lanes a, Lanes b) { return {wasm_f32x4_div(a.v, b.v)}; }
PIFLOW_FN Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }
PIFLOW_FN Lanes max_or_second(Lanes a, Lanes b) { return {wasm_f32x4_pmax(b.v, a.v)}; }
PIFLOW_FN Lanes shifted_to_exponent(Lanes a) { return {wasm_i32x4_shl(a.v, 23)}; }

#else
using Lanes = Scalar;
#endif

// 2^f for |f| <= 1/2: the polynomial of least relative error (2e-9) among those that are 1 at 0.
template <class V>
PIFLOW_FN V exp2_of_fraction(V f) {
  V p = fma(V::splat(0x1.41fbbep-13f), f, V::splat(0x1.5f3e54p-10f));
  p = fma(p, f, V::splat(0x1.3b2d4cp-7f));
  p = fma(p, f, V::splat(0x1.c6aee8p-5f));
  p = fma(p, f, V::splat(0x1.ebfbdcp-3f));
  p = fma(p, f, V::splat(0x1.62e430p-1f));
  return fma(p, f, V::splat(1.0f));
}

// 2^t for t <= 0, within 1.2 units in the last place; below `least`, 2^least, which is as good as 0 beside the
// largest weight, 1, and no subnormal number, which would slow the sums down; NaN for NaN. With n the nearest
// whole number, t - n is exact, and so is the product with 2^n.
template <class V>
PIFLOW_FN V exp2_of_nonpositive(V t, float least = -126.0f) {
  // Adding 1.5 * 2^23 rounds a small number to a whole one, half to even, which its low bits then hold; with
  // 127 more, the exponent's bias, those bits shifted up by 23 are the float 2^n.
  const V round = V::splat(12582912.0f + 127.0f);
  t = max_or_second(V::splat(least), t);  // in this order NaN passes through
  const V n = t + round;
  return exp2_of_fraction(t - (n - round)) * shifted_to_exponent(n);
}

#if defined(__AVX512F__) && !defined(__CUDACC__)
// The same numbers in fewer instructions.
PIFLOW_FN Lanes exp2_of_nonpositive(Lanes t, float least = -126.0f) {
  t = max_or_second(Lanes::splat(least), t);
  const Lanes n = {_mm512_roundscale_ps(t.v, _MM_FROUND_TO_NEAREST_INT)};
  return {_mm512_scalef_ps(exp2_of_fraction(t - n).v, n.v)};
}
#endif

}  // namespace
}  // namespace piflow
