#include "schedule.h"

#include <math.h>

#include <algorithm>

namespace piflow {
namespace {

constexpr double kRenoiseEps = 1e-6;  // of the authors' scheduler
constexpr double kWhole = 1e-6;       // above what warp and unwarp round

double warp(double raw_t, double shift) { return shift * raw_t / (1 + (shift - 1) * raw_t); }

int count_substeps(double raw_time, const ScheduleSettings& settings) {
  const double exact = settings.total_substeps * raw_time;
  return std::max(int(settings.rounds_up ? ceil(exact - kWhole) : nearbyint(exact)), 1);
}

Segment plan_segment(double src, double next, const ScheduleSettings& settings) {
  double m = 1, dst = next;
  if (settings.h > 0) {
    const double ratio = next * (1 - src) / std::max(src * (1 - next), kRenoiseEps);
    m = isinf(settings.h) ? 0 : pow(ratio, settings.h * settings.h);
    dst = next * m / std::max(1 - next + next * m, kRenoiseEps);
  }
  const double start = unwarp(src, settings.shift), end = unwarp(dst, settings.shift);
  const int substeps = count_substeps(start - end, settings);
  Segment segment;
  for (int i = 0; i <= substeps; ++i) {
    const double raw_t = start + (end - start) * (double(i) / substeps);
    segment.sigmas.push_back(warp(std::max(raw_t, 0.0), settings.shift));
  }
  segment.sigmas.front() = src;  // exactly, whatever warp and unwarp rounded
  segment.sigmas.back() = dst;
  if (m < 1 && next > 0) segment.renoise = {1 - next + next * m, next * sqrt(std::max(1 - m * m, 0.0))};
  return segment;
}

}  // namespace

double unwarp(double sigma_t, double shift) { return sigma_t / (shift + (1 - shift) * sigma_t); }

std::vector<Segment> plan_segments(const ScheduleSettings& settings) {
  const double base = 1 / (settings.nfe - 1 + settings.final_step_size_scale);
  std::vector<double> levels;
  for (int i = 0; i < settings.nfe; ++i) levels.push_back(warp(std::max(1 - i * base, 0.0), settings.shift));
  levels.push_back(0);
  std::vector<Segment> segments;
  for (int i = 0; i < settings.nfe; ++i) segments.push_back(plan_segment(levels[i], levels[i + 1], settings));
  return segments;
}

}  // namespace piflow
