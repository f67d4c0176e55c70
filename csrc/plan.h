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
};

// Note [What the plan remembers]
// Reading 400 groups and 400 state dicts by key would cost more than the update of a small model. So the plan remembers
// the objects it found in them, in the dicts' own order, with strong references (an address could otherwise be reused
// by another object), and at each step walks the dicts and compares pointers. What is the same object has the same
// value, except tensors: hyperparameters given as tensors are read at each step, and so are the data pointers of
// parameters, gradients and states. Gradients are never kept, or zero_grad(set_to_none=True) would free nothing.
class StepPlan {
 public:
  explicit StepPlan(const std::string& rule) : rule_(rule_named(rule)) {}

  // Brings the tables up to date. Returns None when every parameter with a gradient is ready for the kernels, else a
  // list of (group index, index in group, reason) of those that are not.
  py::object refresh(const py::list& groups, const py::dict& state, bool write_back);

  // Runs the passes over what refresh() found and returns (scalars, found_inf): a tensor (grad_norm, clip_coef) or
  // None, a 0-dim float32 tensor or None.
  py::tuple step(const StepSettings& settings);

  size_t row_count() const { return rows_.size(); }
  size_t chunk_count() const { return chunks_.size(); }

 private:
  struct GroupEntry {
    py::object key, value;
    int hyper_key;  // index into the rule's keys, or -1
    bool live;      // holds a tensor, whose value may change without the object changing
  };
  struct Group {
    std::vector<GroupEntry> entries;
    py::object params;
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
  // What is read at every step, kept small: with cold caches a step of many small tensors costs what it touches. The
  // pointers are owned by the Owner of the same row.
  struct Watch {
    PyObject* object;
    c10::TensorImpl *param, *step, *state[kMaxStates];
    uint64_t shape;  // hash of the parameter's sizes and strides
    Signature param_signature, grad_signature;
    const char* problem;        // why the parameter cannot be served, or null
    const char* state_problem;  // the same of its state
  };
  // What is needed only when something has changed.
  struct Owner {
    py::object object;
    at::Tensor param, step, state[kMaxStates];
    std::vector<int64_t> sizes, strides;
    std::vector<int> order;  // dimensions longer than 1 in canonical order
    std::unique_ptr<Layout> param_layout, grad_layout, state_layout[kMaxStates];
    uint32_t group, index;
  };

  bool groups_unchanged(const py::list& groups);
  void read_groups(const py::list& groups);
  void read_value(Group& group, size_t group_index, GroupEntry& entry);
  void number_groups();
  void describe_param(size_t r);
  const char* describe_column(Owner& owner, const at::Tensor& tensor, Column& column, std::unique_ptr<Layout>& layout,
                              bool written);
  bool refresh_param(size_t r);
  const char* refresh_grad(size_t r, bool write_back);
  const char* refresh_state(size_t r);
  void resolve_states(const py::dict& state);
  bool states_unchanged(const py::dict& state) const;
  void build_chunks();
  void derive_scalars();
  void finish_update(bool write_back);

  const RuleInterface& rule_;
  std::vector<Group> groups_;
  std::vector<TensorRow> rows_;
  std::vector<Watch> watches_;
  std::vector<Owner> owners_;
  std::vector<Chunk> chunks_;
  std::vector<py::object> seen_states_;
  std::vector<const double*> group_table_;  // one row per distinct set of hyperparameters
  std::vector<ScalarsStorage> scalars_;
  std::vector<double> partials_;
  int64_t elements_ = 0;
  bool any_active_ = false, any_double_ = false, hyper_changed_ = true;
};

}  // namespace fusedopt
