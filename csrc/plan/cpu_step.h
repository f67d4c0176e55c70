// A step of the CPU's own kernels.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "../cpu/executor.h"
#include "../rule_interface.h"
#include "../step.h"
#include "groups.h"
#include "rows.h"

namespace fusedopt::plan {

// Keeps its buffers between steps.
class CpuStep {
 public:
  explicit CpuStep(const RuleInterface& rule) : rule_(rule) {}

  // Runs the passes over rows that are up to date. Returns (scalars, found_inf), as StepPlan::step.
  py::object run(const Groups& groups, Rows& rows, const StepSettings& settings);

 private:
  // What the passes found out and decided.
  struct Outcome {
    double norm = 0, coefficient = 1;
    bool skip = false;
  };

  void derive_scalars(const Groups& groups, Rows& rows);
  Outcome run_passes(const Groups& groups, Rows& rows, const StepSettings& settings);

  const RuleInterface& rule_;
  std::vector<ScalarsStorage> scalars_;  // one row per distinct pair of hyperparameters and step count
  std::vector<double> partials_;
};

}  // namespace fusedopt::plan
