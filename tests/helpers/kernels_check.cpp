// What can be checked of the kernels from within only: the exponential, number by number, and memory. Arrays
// are allocated to the byte, so that AddressSanitizer sees a read past an image's end. Prints the worst
// error; a failed check ends the program with the line it stands in.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "lanes.h"
#include "piflow_kernels.h"

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) {                                                     \
      fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition); \
      exit(1);                                                              \
    }                                                                       \
  } while (0)

static float exp2_in_first_lane(float t) {
  float lanes[piflow::Lanes::width];
  piflow::exp2_of_nonpositive(piflow::Lanes::splat(t)).store(lanes);
  return lanes[0];
}

static void check_exponential() {
  CHECK(exp2_in_first_lane(0.0f) == 1.0f);
  CHECK(exp2_in_first_lane(-1.0f) == 0.5f);
  for (float t : {-126.0f, -126.6f, -1e8f, -HUGE_VALF}) CHECK(exp2_in_first_lane(t) == 0x1p-126f);
  CHECK(isnan(exp2_in_first_lane(NAN)));
  float lanes[piflow::Lanes::width];
  piflow::exp2_of_nonpositive(piflow::Lanes::splat(-HUGE_VALF), -64.0f).store(lanes);
  CHECK(lanes[0] == 0x1p-64f);
  double worst = 0;
  // All floats down to -125 in steps of 499 bit patterns: 2 million of them.
  for (uint32_t bits = 0x80000000u; bits <= 0xC2FA0000u; bits += 499) {
    float t;
    memcpy(&t, &bits, sizeof t);
    const double exact = exp2(double(t));
    const double ulp = ldexp(1.0, ilogb(exact) - 23);
    worst = fmax(worst, fabs(exp2_in_first_lane(t) - exact) / ulp);
  }
  printf("exp2 is within %.3f units in the last place\n", worst);
  CHECK(worst <= 1.5);  // 0.92 with fma, 1.19 without
}

static uint32_t random_state = 1;
static float uniform() {  // in [-1, 1)
  random_state = random_state * 1664525u + 1013904223u;
  return float(int32_t(random_state)) * 0x1p-31f;
}

static std::vector<float> numbers(int64_t count) {
  std::vector<float> out;
  out.reserve(size_t(count));  // exactly: one more is out of bounds
  for (int64_t i = 0; i < count; ++i) out.push_back(uniform());
  return out;
}

static std::vector<float> gm(int64_t batch, int64_t K, int64_t C, int64_t pixels,
                             const piflow_options& options) {
  random_state = 1;
  const auto means = numbers(batch * K * C * pixels), logweights = numbers(batch * K * pixels);
  const auto x_src = numbers(batch * C * pixels), x_start = numbers(batch * C * pixels);
  std::vector<float> x_dst(x_src.size());
  const std::vector<double> sigma_src(size_t(batch), 0.75), variance(size_t(batch), 0.01);
  std::vector<double> sigmas;
  for (double sigma : {0.6, 0.3, 1e-5, 0.0}) sigmas.insert(sigmas.end(), size_t(batch), sigma);
  const piflow_gm problem = {batch,
                             K,
                             C,
                             pixels,
                             3,
                             means.data(),
                             logweights.data(),
                             x_src.data(),
                             x_start.data(),
                             x_dst.data(),
                             sigma_src.data(),
                             variance.data(),
                             sigmas.data(),
                             1e-4};
  CHECK(piflow_gm_rollout(&problem, &options) == PIFLOW_OK);
  for (float x : x_dst) CHECK(fabsf(x) < 10);
  return x_dst;
}

static std::vector<float> dx(int64_t batch, int64_t N, int64_t size, const piflow_options& options) {
  random_state = 2;
  const auto grid = numbers(batch * N * size), x_src = numbers(batch * size), x_start = numbers(batch * size);
  std::vector<float> x_dst(x_src.size());
  const std::vector<double> weights(size_t(batch * (2 + N)), 1.0 / double(2 + N));
  const piflow_dx problem = {batch,         N, size, grid.data(), x_src.data(), x_start.data(), x_dst.data(),
                             weights.data()};
  CHECK(piflow_dx_rollout(&problem, &options) == PIFLOW_OK);
  for (float x : x_dst) CHECK(fabsf(x) <= 1);
  return x_dst;
}

static void check_memory(const char* isa) {
  for (int64_t pixels : {1, 3, 16, 17, 63, 64, 65, 131}) {
    for (int64_t K : {1, 4, 6, 9}) {  // in either form of the rollout, one tile at a time and in turns
      for (int64_t C : {1, 3, 8, 15}) {
        CHECK(gm(2, K, C, pixels, {1, isa}) == gm(2, K, C, pixels, {3, isa}));
      }
    }
    for (int64_t N : {1, 7}) CHECK(dx(2, N, 131 * pixels, {1, isa}) == dx(2, N, 131 * pixels, {3, isa}));
  }
}

static void check_refusals() {
  CHECK(piflow_gm_rollout(nullptr, nullptr) == PIFLOW_BAD_ARGUMENT);
  CHECK(piflow_dx_rollout(nullptr, nullptr) == PIFLOW_BAD_ARGUMENT);
  const piflow_gm empty_gm = {};
  const piflow_dx empty_dx = {};
  CHECK(piflow_gm_rollout(&empty_gm, nullptr) == PIFLOW_BAD_ARGUMENT);
  CHECK(piflow_dx_rollout(&empty_dx, nullptr) == PIFLOW_BAD_ARGUMENT);
  const float x[1] = {0};
  float x_dst[1];
  const double one[1] = {1.0};
  for (double sigma : {double(NAN), -0.1, 1.1}) {
    const double sigmas[2] = {1.0, sigma};
    const piflow_gm problem = {1, 1, 1, 1, 1, x, x, x, x, x_dst, one, one, sigmas, 1e-4};
    CHECK(piflow_gm_rollout(&problem, nullptr) == PIFLOW_BAD_ARGUMENT);
  }
  const piflow_dx problem = {1, 1, 1, x, x, x, x_dst, one};
  const piflow_options unknown = {0, "mmx"};
  CHECK(piflow_dx_rollout(&problem, &unknown) == PIFLOW_UNKNOWN_ISA);
}

// With an argument, the exponential alone: the one of the flags this file was compiled with.
int main(int argc, char**) {
  check_exponential();
  const std::string isas = argc > 1 ? "" : piflow_isas();
  if (argc == 1) check_refusals();
  for (size_t from = 0; from < isas.size();) {
    const size_t to = isas.find(' ', from) == std::string::npos ? isas.size() : isas.find(' ', from);
    check_memory(isas.substr(from, to - from).c_str());
    from = to + 1;
  }
  printf("checked %s\n", isas.c_str());
}
