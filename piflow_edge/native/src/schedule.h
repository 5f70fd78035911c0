// Time: where the network is called, and what happens in between. The formulas are those of piflow_edge/schedule.py.
#pragma once

#include <optional>
#include <utility>
#include <vector>

namespace piflow {

struct ScheduleSettings {
  int nfe = 1;
  double shift = 1, final_step_size_scale = 1;
  int total_substeps = 128;
  double h = 0;
  bool rounds_up = false;  // a segment's share of the substeps; else to the nearest
};

// What one network call covers. `sigmas`: noise levels of its substeps, from the level it is called at. `renoise`:
// factors of the state and of fresh noise at its end, where some is added.
struct Segment {
  std::vector<double> sigmas;
  std::optional<std::pair<double, double>> renoise;
};

double unwarp(double sigma_t, double shift);
std::vector<Segment> plan_segments(const ScheduleSettings& settings);

}  // namespace piflow
