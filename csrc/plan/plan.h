// StepPlan: what a step works on, kept between steps and checked against the optimizer at each one.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "../device/executor.h"
#include "../rule_interface.h"
#include "../step.h"
#include "cpu_step.h"
#include "groups.h"
#include "precision.h"
#include "rows.h"
#include "states.h"
#include "target.h"

namespace fusedopt {

// Note [What the plan remembers]
// Reading 400 groups and 400 state dicts by key would cost more than the update of a small model. So the plan remembers
// at which position of a dict it found what it needs, and at each step looks there: the same key object at the same
// position means that the value beside it is the one of that key, now.
//
// Where Python tells that a dict has not changed, it holds the very objects it had, and is not looked into: see
// Note [Dicts that have not changed].
//
// Of parameters, states and gradients it remembers addresses only, so it keeps none of them alive and forms no cycle.
// An address that was given to another object does no harm: tensors are reached through the dicts and lists of this
// very step, or are known to be in them still, and their kind, dtype, shape and data pointer are read each time.
// Hyperparameters are compared by address, so the plan holds on to those objects: what is the same Python number has
// the same value. Tensors, arrays and lists given as hyperparameters are read at each step.
//
// Note [A step in two halves]
// Where parts of the gradients are in other processes or optimizers, what the statistics pass finds has to go around
// between the passes. Parameters are sorted into domains: those of one have their parts in the same processes. The
// first half ends with a total of each domain; the caller, in Python, makes of them any number of pairs whose sum is
// that of all, the same everywhere; the second half draws the conclusions and updates. Which domain a parameter is in
// is asked of `shards`, whenever parameters were read anew.
class StepPlan {
 public:
  // `device` is "cpu", "cuda", or "emulated": the kernels of CUDA run as host code on CPU tensors, for tests; the
  // parameters are then dealt out to so many `emulated_devices`. Any kind of device will do with a `launcher`, an
  // object of Python that launches the kernels. Throws std::invalid_argument for another device, or when the build
  // lacks it.
  //
  // `shards`, called with the groups, returns None where all gradients are here, or a list of the domain of each
  // parameter, and how many domains there are. For `precision` see plan::Precision.
  StepPlan(const std::string& rule, const std::string& device, int emulated_devices, const py::object& launcher,
           const py::object& shards, const py::object& precision);

  // Brings the tables up to date and runs the passes. Returns (scalars, found_inf): a tensor (grad_norm, clip_coef) or
  // None, a 0-dim float32 tensor or None. When a parameter with a gradient is not ready for the kernels, nothing is run
  // and a list of (group index, index in group, reason, whether it is only the state that is missing) is returned; the
  // last is None where there is nothing to mend. For `counts` see plan::States.
  //
  // Of a step that has to hear from others only the first half is made, when something is to be found out: the pairs
  // are returned, see CpuStep::find, or None where no parameter takes part, when there is no second half. Where such a
  // step is given `found_inf`, that is for the caller to put into the pairs, in place of what was found of it here. So
  // is the first half of any step returned with `half`. A step that is given `found_inf` and finds nothing out itself
  // changes nothing and returns False where others have to be heard about that, unless it is `agreed`.
  py::object step(const py::object& groups, const py::dict& state, const py::object& counts,
                  const StepSettings& settings, bool half, bool agreed);
  // The second half, with numbers and tensors of `settings` still alive.
  py::object finish(const at::Tensor& pairs);
  // In place of the second half: nothing has changed.
  void abandon() { half_.reset(); }

  // A number as an argument of step(): read, or left where it is when that is the plan's device.
  Number number(const py::object& value) const;

  size_t row_count() const { return rows_.size(); }
  size_t chunk_count() const { return rows_.chunks.size(); }
  // Whether a step count may be an int64 tensor: kernels on a device know floating-point numbers only.
  bool counts_integers() const { return !kernels_.target.device_kernels; }
  // Whether hyperparameters were read since the last call that are numbers of another package than Python or torch.
  bool take_foreign_numbers() { return groups_.take_foreign_numbers(); }

 private:
  // What a step remembers between its halves.
  struct Half {
    StepSettings settings;
    bool capturing;
    plan::Held held;  // what the tables have the addresses of
  };

  // What runs a step.
  struct Kernels {
    plan::Target target;
    std::unique_ptr<device::Launcher> launcher;  // that calls Python; null for one that lasts as long as the module
    std::unique_ptr<device::Executor> executor;  // null for the CPU's own kernels
  };

  static Kernels kernels_for(const std::string& device, const py::object& launcher);
  // Brings groups, rows and states up to date; after an error all are read afresh.
  void refresh(PyObject* groups, PyObject* state, PyObject* counts, bool write_back, plan::Problems& problems);
  void bring_up_to_date(PyObject* groups, PyObject* state, PyObject* counts, bool write_back, plan::Problems& problems);
  bool look(PyObject* state, PyObject* counts, bool write_back, plan::Problems& problems);
  void find_domains(PyObject* groups);
  void find_numbers(PyObject* groups);
  // Fills in row_devices_ and devices_.
  void place_rows();
  // Whether the current stream of a device is capturing a graph.
  bool capturing() const;
  plan::Problems refused_in_capture() const;
  py::list told(const plan::Problems& problems, bool can_mend) const;
  device::Work work(bool capturing) const;
  py::object first_half(const StepSettings& settings, bool capturing);
  // Calls the executor with a way to wait for the device, and returns what it reports.
  py::object on_devices(const StepSettings& settings,
                        const std::function<device::Outcome(const device::Executor::Wait&)>& run);

  const RuleInterface& rule_;
  const Kernels kernels_;
  const int emulated_devices_;
  const plan::Precision precision_;
  plan::Groups groups_;
  plan::Rows rows_;
  plan::States states_;
  plan::CpuStep cpu_step_;
  std::vector<int> row_devices_;  // for the executor
  std::set<int> devices_;         // of rows that can take part
  bool running_ = false;          // a step is, perhaps in another thread
  std::optional<Half> half_;      // between the halves of one
  const py::object shards_;
  bool domains_known_ = false;
  uint32_t domains_ = 1;
  bool spread_ = false;  // parts of the gradients are in other processes
};

}  // namespace fusedopt
