// StepPlan: what a step works on, kept between steps and checked against the optimizer at each one.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "device/executor.h"
#include "rule_interface.h"
#include "step.h"
#include "tables.h"
#include "tensors.h"

namespace fusedopt {

// Note [What the plan remembers]
// Reading 400 groups and 400 state dicts by key would cost more than the update of a small model. So the plan remembers
// at which position of a dict it found what it needs, and at each step looks there: the same key object at the same
// position means that the value beside it is the one of that key, now.
//
// Where Python numbers the states of a dict (before 3.12), a dict with the number it had holds the very objects it had,
// and is not looked at further.
//
// Of parameters, states and gradients it remembers addresses only, so it keeps none of them alive and forms no cycle.
// An address that was given to another object does no harm: tensors are reached through the dicts and lists of this
// very step, or are known to be in them still, and their kind, dtype, shape and data pointer are read each time.
// Hyperparameters are compared by address, so the plan holds on to those objects: what is the same Python number has
// the same value. Tensors, arrays and lists given as hyperparameters are read at each step.
class StepPlan {
 public:
  // `device` is "cpu", "cuda", or "emulated": the kernels of CUDA run as host code on CPU tensors, for tests; the
  // parameters are then dealt out to so many `emulated_devices`. Any kind of device will do with a `launcher`, an
  // object of Python that launches the kernels. Throws std::invalid_argument for another device, or when the build
  // lacks it.
  StepPlan(const std::string& rule, const std::string& device, int emulated_devices, const py::object& launcher);

  // Brings the tables up to date and runs the passes. Returns (scalars, found_inf): a tensor (grad_norm, clip_coef) or
  // None, a 0-dim float32 tensor or None. When a parameter with a gradient is not ready for the kernels, nothing is run
  // and a list of (group index, index in group, reason, whether it is only the state that is missing) is returned; the
  // last is None where there is nothing to mend.
  //
  // Step counts are in the states, or, where the optimizer hides them there, in `counts`: by parameter, a tuple (count,
  // weak reference to the first column that it counts the steps of). See fusedopt/rules/counts.py.
  py::object step(const py::object& groups, const py::dict& state, const py::object& counts,
                  const StepSettings& settings);

  // A number as an argument of step(): read, or left where it is when that is the plan's device.
  Number number(const py::object& value) const;

  size_t row_count() const { return rows_.size(); }
  size_t chunk_count() const { return chunks_.size(); }
  // Whether a step count may be an int64 tensor: kernels on a device know floating-point numbers only.
  bool counts_integers() const { return !runner_; }
  // Whether hyperparameters were read since the last call that are numbers of another package than Python or torch.
  bool take_foreign_numbers() { return std::exchange(foreign_numbers_, false); }

 private:
  struct GroupEntry {
    py::object key;
    py::object value;     // of a hyperparameter, else null
    Py_ssize_t position;  // in the group's dict
    int hyper_key;        // index into the rule's keys, or kParams
    bool live;            // may change without being replaced
  };
  static constexpr int kParams = -1;
  struct Group {
    std::vector<GroupEntry> entries;
    HyperValues hyper;
    unsigned columns;
    uint32_t table_row;
    uint64_t version;  // of its dict, when that was last read
    bool live;         // some entry is
    PyObject* params;
    const void *dict_entries, *items;  // for prefetching only
  };
  struct Watched {
    c10::TensorImpl* impl;  // of this step
    Form form;
    void take(c10::TensorImpl* now) {
      impl = now;
      form.take(now);
    }
    // Whether `now` is as it was found; it is the tensor of this step then.
    bool renew(c10::TensorImpl* now) {
      const bool same = form.matches(now, impl);
      impl = now;
      return same;
    }
  };
  // What is read at every step, kept small: with cold caches a step of many small tensors costs what it touches.
  struct Watch {
    PyObject* object;  // the parameter, alive in its group's list during a step
    uint32_t group, index;
    bool integer_count;
    Watched param, grad, step, state[kMaxStates];
    const void* autograd;       // for prefetching only
    const char* problem;        // why the parameter cannot be served, or null
    const char* state_problem;  // the same of its state
  };
  // What is needed only when something has changed.
  struct Owner {
    c10::Device device = at::kCPU;
    std::vector<int64_t> sizes;
    std::vector<int> order;  // dimensions longer than 1 in canonical order
    std::unique_ptr<Layout> param_layout, grad_layout, state_layout[kMaxStates];
  };
  // Names of the step count and of the columns in a state dict, null for one that is not there, and their positions.
  struct StateKeys {
    py::object name[1 + kMaxStates];
    Py_ssize_t position[1 + kMaxStates];
  };
  // Where the optimizer's state has the state dict of one row.
  struct StateEntry {
    Py_ssize_t position;
    uint32_t row, keys;  // row of watches_, row of state_keys_
    PyObject* dict;
    uint64_t version;  // of the dict, when its objects were last read
    PyObject* objects[1 + kMaxStates];
    const void* dict_entries;   // for prefetching only
    Py_ssize_t count_position;  // in the dict of hidden counts
    PyObject* counted;          // the weak reference there
  };
  using HiddenCounts = std::unordered_map<PyObject*, std::pair<Py_ssize_t, PyObject*>>;

  py::object refresh(PyObject* groups, PyObject* state, PyObject* counts, bool write_back);
  bool groups_unchanged(PyObject* groups);
  void read_groups(PyObject* groups);
  bool read_number(PyObject* value, HyperValues& hyper, int slot);
  void read_value(Group& group, Py_ssize_t group_index, GroupEntry& entry);
  void number_groups();
  void describe_param(size_t r);
  const char* describe_column(Owner& owner, const at::Tensor& tensor, Column& column, std::unique_ptr<Layout>& layout,
                              bool written);
  bool refresh_param(size_t r);
  const char* refresh_grad(size_t r, bool write_back);
  bool refresh_states(PyObject* state, PyObject* counts);
  bool refresh_count(PyObject* counts, StateEntry& entry, bool same_counts);
  void resolve_states(PyObject* state, PyObject* counts);
  const char* resolve_state(size_t r, PyObject* inner, const HiddenCounts* counts, StateEntry& entry);
  double count_of(size_t r) const;
  void prefetch_group(size_t g, PyObject* dict) const;
  void prefetch_row(size_t r) const;
  void prefetch_state(size_t e) const;
  void build_chunks();
  void find_overlaps();
  void refuse_in_capture(py::list& problems);
  std::vector<at::Tensor> hold_tensors() const;
  py::object step_on_devices(const StepSettings& settings);
  void derive_scalars();
  void count_steps();
  void bump_versions(bool write_back);

  const RuleInterface& rule_;
  c10::DeviceType device_ = at::kCPU;
  std::unique_ptr<device::Launcher> launcher_;  // null for one that lasts as long as the module
  std::unique_ptr<device::Executor> runner_;    // null for the CPU's own kernels
  int emulated_devices_ = 1;
  std::vector<int> row_devices_;  // for the runner
  std::vector<Group> groups_;
  std::vector<TensorRow> rows_;
  std::vector<Watch> watches_;
  std::vector<Owner> owners_;
  std::vector<Chunk> chunks_;
  std::vector<StateEntry> state_entries_;
  std::vector<StateKeys> state_keys_;            // one row per distinct layout of a state dict
  std::vector<const HyperValues*> group_table_;  // one row per distinct set of hyperparameters
  std::vector<ScalarsStorage> scalars_;
  std::vector<double> partials_;
  int64_t elements_ = 0;
  uint64_t state_version_ = 0, counts_version_ = 0;  // of the optimizer's state and counts, when last read
  bool any_active_ = false, any_double_ = false;
  bool hyper_changed_ = true, overlaps_ = false;
  bool states_known_ = false, state_problems_ = false;
  bool running_ = false, capturing_ = false;
  bool foreign_numbers_ = false;
};

}  // namespace fusedopt
