// StepPlan: what a step works on, kept between steps and checked against the optimizer at each one.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <string>
#include <vector>

#include "rules/rules.h"
#include "tables.h"

namespace fusedopt {

// A rule behind plain functions, for host code that is the same for all of them.
struct RuleInterface {
  RuleId id;
  const char* name;
  const HyperKey* keys;
  int key_count;
  const char* const* states;
  int state_count;
  unsigned (*variant)(const double* hyper, double step);
  unsigned (*columns)(unsigned variant);
  void (*derive)(const double* hyper, double step, ScalarsStorage* out);
};

const RuleInterface& rule_named(const std::string& name);
std::vector<std::string> rule_names();

// The value of a one-element tensor.
double scalar_of(const at::Tensor& tensor);

// Which passes a step makes; see Note [Three modes] in fusedopt/backends/base.py.
enum class Mode { kBare, kCheck, kFull };

// What one step asks for; the C++ side of fusedopt.backends.StepRequest.
struct StepSettings {
  double inverse_scale = 1;
  bool has_found_inf = false;
  double found_inf = 0;
  bool check = false;
  StatisticsSettings norm{NormKind::kNone, 2};
  double max_norm = 0;
  bool error_if_nonfinite = false;
  double clip_value = 0;  // infinite without value clipping
  bool write_back = false;

  Mode mode() const {
    if (norm.kind != NormKind::kNone) return Mode::kFull;
    return check ? Mode::kCheck : Mode::kBare;
  }
};

// Note [What the plan remembers]
// Reading 400 groups and 400 state dicts by key would cost more than the update of a small model. So the plan remembers
// what it found in them, in the dicts' own order, and at each step walks the dicts and compares addresses.
//
// Of parameters, states and gradients it remembers addresses only, so it keeps none of them alive and forms no cycle.
// An address that was given to another object does no harm: tensors are reached through the dicts and lists of this
// very step, never through an address that was kept, and their kind, dtype, shape and data pointer are compared each
// time. Hyperparameters are compared by address too, so the plan holds on to those objects: what is the same Python
// number has the same value. Tensors, arrays and lists given as hyperparameters are read at each step.
class StepPlan {
 public:
  explicit StepPlan(const std::string& rule) : rule_(rule_named(rule)) {}

  // Brings the tables up to date and runs the passes. Returns (scalars, found_inf): a tensor (grad_norm, clip_coef) or
  // None, a 0-dim float32 tensor or None. When a parameter with a gradient is not ready for the kernels, nothing is run
  // and a list of (group index, index in group, reason, whether it is only the state that is missing) is returned.
  py::object step(const py::object& groups, const py::dict& state, const StepSettings& settings);

  size_t row_count() const { return rows_.size(); }
  size_t chunk_count() const { return chunks_.size(); }

 private:
  struct GroupEntry {
    py::object key;
    py::object value;  // of a hyperparameter, else null
    int hyper_key;     // index into the rule's keys, kParams, or kOther
    bool live;         // may change without being replaced
  };
  static constexpr int kParams = -1, kOther = -2;
  struct Group {
    std::vector<GroupEntry> entries;
    double hyper[kMaxHyper];
    unsigned columns;
    uint32_t table_row;
  };
  // Kind, device and dtype of a tensor that was found fit for the kernels: one that has the same is fit too.
  struct Signature {
    c10::DispatchKeySet keys;
    caffe2::TypeMeta dtype;
    bool matches(const c10::TensorImpl* impl) const { return impl->key_set() == keys && impl->dtype() == dtype; }
    void take(const c10::TensorImpl* impl) {
      keys = impl->key_set();
      dtype = impl->dtype();
    }
  };
  struct Watched {
    c10::TensorImpl* impl;  // of this step
    Signature signature;
    uint64_t shape;  // hash of sizes and strides
    bool unchanged() const;
    void take(c10::TensorImpl* now);
  };
  // What is read at every step, kept small: with cold caches a step of many small tensors costs what it touches.
  struct Watch {
    PyObject* object;  // the parameter, alive in its group's list during a step
    uint32_t group, index;
    Watched param, step, state[kMaxStates];
    Signature grad_signature;
    const char* problem;        // why the parameter cannot be served, or null
    const char* state_problem;  // the same of its state
  };
  // What is needed only when something has changed.
  struct Owner {
    std::vector<int64_t> sizes;
    std::vector<int> order;  // dimensions longer than 1 in canonical order
    std::unique_ptr<Layout> param_layout, grad_layout, state_layout[kMaxStates];
  };
  // One object that a walk over the state dicts meets, and the column it is of a row, if any.
  struct SeenState {
    PyObject* object;
    const void* entries;  // where a dict's entries were, for prefetching only
    uint32_t row;
    int8_t column;
  };
  static constexpr int8_t kNoColumn = -1, kStepColumn = kMaxStates;

  py::object refresh(PyObject* groups, PyObject* state, bool write_back);
  bool groups_unchanged(PyObject* groups);
  void read_groups(PyObject* groups);
  void read_value(Group& group, Py_ssize_t group_index, GroupEntry& entry);
  void number_groups();
  void describe_param(size_t r);
  const char* describe_column(Owner& owner, const at::Tensor& tensor, Column& column, std::unique_ptr<Layout>& layout,
                              bool written);
  bool refresh_param(size_t r);
  const char* refresh_grad(size_t r, bool write_back);
  bool refresh_state(size_t r);
  void resolve_states(PyObject* state);
  const char* resolve_state(size_t r, PyObject* inner);
  bool states_unchanged(PyObject* state);
  void prefetch_params() const;
  void prefetch_states() const;
  void prefetch_data() const;
  void build_chunks();
  void find_overlaps();
  void derive_scalars();
  void finish_update(bool write_back);

  const RuleInterface& rule_;
  std::vector<Group> groups_;
  std::vector<TensorRow> rows_;
  std::vector<Watch> watches_;
  std::vector<Owner> owners_;
  std::vector<Chunk> chunks_;
  std::vector<SeenState> seen_states_;
  std::vector<const double*> group_table_;  // one row per distinct set of hyperparameters
  std::vector<ScalarsStorage> scalars_;
  std::vector<double> partials_;
  int64_t elements_ = 0;
  bool any_active_ = false, any_double_ = false;
  bool hyper_changed_ = true, states_known_ = false, overlaps_ = false;
  bool running_ = false;
};

}  // namespace fusedopt
