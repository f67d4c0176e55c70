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
  CpuStep(const RuleInterface& rule, const AverageSettings& average) : rule_(rule), average_(average) {}

  // Runs the passes over rows that are up to date. Returns (scalars, found_inf), as StepPlan::step.
  py::object run(const Groups& groups, const Rows& rows, const StepSettings& settings);
  // The same in two halves, as device::Executor's.
  at::Tensor find(const Rows& rows, const StepSettings& settings, uint32_t domains);
  py::object finish(const Groups& groups, const Rows& rows, const StepSettings& settings, const at::Tensor& pairs);

 private:
  // What is found, of one domain or of all.
  struct Found {
    double total = 0;
    double nonfinite = 0;  // 1 when a gradient is not finite
  };
  // What the passes decided.
  struct Outcome {
    double norm = 0, coefficient = 1;
    bool skip = false;
  };

  void derive_scalars(const Groups& groups, const Rows& rows);
  std::vector<Found> add_up(const Rows& rows, const StepSettings& settings, uint32_t domains);
  Outcome conclude(const StepSettings& settings, const Found* found, size_t count) const;
  Outcome run_passes(const Groups& groups, const Rows& rows, const StepSettings& settings);
  bool update(const Rows& rows, const StepSettings& settings, const Outcome& outcome);
  void settle(const Rows& rows, const StepSettings& settings, const Outcome& outcome, bool refused) const;
  py::object reported(const Rows& rows, const StepSettings& settings, const Outcome& outcome) const;

  const RuleInterface& rule_;
  const AverageSettings average_;
  std::vector<RowScalars> scalars_;       // one row per distinct pair of hyperparameters and step count
  std::vector<uint32_t> scalars_of_row_;  // which of them is that of a row that takes part
  std::vector<double> partials_;
};

}  // namespace fusedopt::plan
