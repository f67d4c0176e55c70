#include "plan.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

#include "cpu/executor.h"

namespace fusedopt {
namespace {

template <class Rule>
RuleInterface interface_of(RuleId id) {
  return {id,
          Rule::kName,
          Rule::kKeys,
          static_cast<int>(std::size(Rule::kKeys)),
          Rule::kStates,
          static_cast<int>(std::size(Rule::kStates)),
          [](const double* hyper, double step) { return Rule::variant(hyper, step); },
          [](unsigned variant) { return Rule::columns(variant); },
          [](const double* hyper, double step, ScalarsStorage* out) {
            auto scalars = Rule::derive(hyper, step);
            std::memcpy(out, &scalars, sizeof(scalars));
          }};
}

const RuleInterface kRules[] = {
#define FUSEDOPT_RULE_INTERFACE(Rule) interface_of<Rule>(kRule##Rule),
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_RULE_INTERFACE)
#undef FUSEDOPT_RULE_INTERFACE
};

bool to_dtype(const c10::TensorImpl* impl, DType& out) {
  switch (c10::typeMetaToScalarType(impl->dtype())) {
    case at::kFloat:
      out = DType::kFloat32;
      return true;
    case at::kDouble:
      out = DType::kFloat64;
      return true;
    case at::kBFloat16:
      out = DType::kBFloat16;
      return true;
    case at::kHalf:
      out = DType::kFloat16;
      return true;
    default:
      return false;
  }
}

// Why the kernels cannot touch this tensor's memory at all, or null.
const char* foreign(const c10::TensorImpl* impl) {
  if (impl->is_python_dispatch() || impl->layout() != c10::kStrided || !impl->has_storage()) {
    return "is not a plain dense tensor";
  }
  if (!impl->is_cpu()) return "is not on the CPU";
  if (impl->key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Negative, c10::DispatchKey::Conjugate}))) {
    return "is a lazily negated or conjugated view";
  }
  DType dtype;
  return to_dtype(impl, dtype) ? nullptr : "has an unsupported dtype";
}

// Any of an int, a float, a bool, a one-element tensor, or something with __float__. Returns false for anything else.
bool to_double(PyObject* value, double& out) {
  if (PyFloat_Check(value)) {
    out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.numel() != 1) return false;
    out = tensor.item<double>();
    return true;
  }
  out = PyFloat_AsDouble(value);
  if (out == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// Visits the outer keys and values, and the values of inner dicts, in their order, while visit returns true.
template <class Visit>
bool walk_state(PyObject* state, Visit&& visit) {
  Py_ssize_t position = 0;
  PyObject *key, *value, *inner;
  while (PyDict_Next(state, &position, &key, &value)) {
    if (!visit(key) || !visit(value)) return false;
    if (!PyDict_CheckExact(value)) continue;
    Py_ssize_t inner_position = 0;
    while (PyDict_Next(value, &inner_position, nullptr, &inner)) {
      if (!visit(inner)) return false;
    }
  }
  return true;
}

// Hash of sizes and strides (FNV-1a over words).
uint64_t shape_of(const c10::TensorImpl* impl) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t size : impl->sizes()) hash = (hash ^ static_cast<uint64_t>(size)) * 0x100000001b3u;
  for (int64_t stride : impl->strides()) hash = (hash ^ static_cast<uint64_t>(stride)) * 0x100000001b3u;
  return hash;
}

// Stands for the data of an empty gradient, whose own pointer is null: null means "takes no part".
char kEmpty;

}  // namespace

const RuleInterface& rule_named(const std::string& name) {
  for (const RuleInterface& rule : kRules) {
    if (name == rule.name) return rule;
  }
  throw std::invalid_argument("no kernels for a rule called '" + name + "'");
}

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const RuleInterface& rule : kRules) names.emplace_back(rule.name);
  return names;
}

void StepPlan::read_value(Group& group, size_t group_index, GroupEntry& entry) {
  const HyperKey& key = rule_.keys[entry.hyper_key];
  double* slots = group.hyper + key.slot;
  PyObject* value = entry.value.ptr();
  bool ok = true;
  entry.live = false;
  if (key.arity == 1) {
    ok = to_double(value, slots[0]);
    entry.live = THPVariable_Check(value);
  } else {
    PyObject* sequence = PySequence_Fast(value, "");
    if (!sequence) PyErr_Clear();
    ok = sequence && PySequence_Fast_GET_SIZE(sequence) == key.arity;
    for (int i = 0; ok && i < key.arity; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(sequence, i);
      ok = to_double(item, slots[i]);
      entry.live |= THPVariable_Check(item);
    }
    entry.live |= !PyTuple_CheckExact(value);  // a list may be edited in place
    Py_XDECREF(sequence);
  }
  if (!ok) {
    throw py::type_error("param_groups[" + std::to_string(group_index) + "]['" + key.key + "'] is " +
                         py::repr(entry.value).cast<std::string>() + "; expected " +
                         (key.arity == 1 ? "a number or a 1-element tensor" : "two numbers or 1-element tensors"));
  }
  hyper_changed_ = true;
}

bool StepPlan::groups_unchanged(const py::list& groups) {
  if (groups.size() != groups_.size()) return false;
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    PyObject* dict = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(g));
    if (!PyDict_Check(dict)) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    size_t e = 0;
    while (PyDict_Next(dict, &position, &key, &value)) {
      if (e == group.entries.size() || group.entries[e].key.ptr() != key) return false;
      GroupEntry& entry = group.entries[e++];
      const bool replaced = entry.value.ptr() != value;
      if (replaced && entry.value.ptr() == group.params.ptr()) return false;
      if (replaced) entry.value = py::reinterpret_borrow<py::object>(value);
      if (entry.hyper_key >= 0 && (replaced || entry.live)) read_value(group, g, entry);
    }
    if (e != group.entries.size()) return false;
  }
  size_t row = 0;
  for (const Group& group : groups_) {
    const Py_ssize_t count = PyList_GET_SIZE(group.params.ptr());
    for (Py_ssize_t i = 0; i < count; ++i, ++row) {
      if (row == watches_.size() || watches_[row].object != PyList_GET_ITEM(group.params.ptr(), i)) return false;
    }
  }
  return row == watches_.size();
}

void StepPlan::read_groups(const py::list& groups) {
  groups_.clear();
  rows_.clear();
  owners_.clear();
  watches_.clear();
  seen_states_.clear();
  for (size_t g = 0; g < groups.size(); ++g) {
    const py::dict dict = groups[g];
    Group group{};
    bool found[kMaxHyper] = {};
    for (auto item : dict) {
      GroupEntry entry{py::reinterpret_borrow<py::object>(item.first), py::reinterpret_borrow<py::object>(item.second),
                       -1, false};
      if (py::isinstance<py::str>(entry.key)) {
        const std::string name = entry.key.cast<std::string>();
        if (name == "params") group.params = entry.value;
        for (int k = 0; k < rule_.key_count; ++k) {
          if (name != rule_.keys[k].key) continue;
          entry.hyper_key = k;
          found[k] = true;
          read_value(group, g, entry);
        }
      }
      group.entries.push_back(std::move(entry));
    }
    for (int k = 0; k < rule_.key_count; ++k) {
      if (!found[k]) {
        throw py::key_error("param_groups[" + std::to_string(g) + "] has no '" + rule_.keys[k].key + "'");
      }
    }
    if (!group.params || !PyList_Check(group.params.ptr())) {
      throw py::type_error("param_groups[" + std::to_string(g) + "]['params'] is not a list");
    }
    const Py_ssize_t count = PyList_GET_SIZE(group.params.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* object = PyList_GET_ITEM(group.params.ptr(), i);
      if (!THPVariable_Check(object)) {
        throw py::type_error("param_groups[" + std::to_string(g) + "]['params'][" + std::to_string(i) +
                             "] is not a tensor");
      }
      Owner owner{};
      owner.object = py::reinterpret_borrow<py::object>(object);
      owner.param = THPVariable_Unpack(object);
      owner.group = static_cast<uint32_t>(g);
      owner.index = static_cast<uint32_t>(i);
      watches_.push_back({object, owner.param.unsafeGetTensorImpl(), nullptr, {}, 0, {}, {}, nullptr, nullptr});
      owners_.push_back(std::move(owner));
      rows_.push_back({});
      describe_param(rows_.size() - 1);
    }
    groups_.push_back(std::move(group));
  }
  hyper_changed_ = true;
  build_chunks();
}

// Gives equal sets of hyperparameters one row of the group table: 400 groups are rarely 400 values.
void StepPlan::number_groups() {
  std::unordered_map<std::string_view, uint32_t> numbers;
  group_table_.clear();
  for (Group& group : groups_) {
    const std::string_view bytes(reinterpret_cast<const char*>(group.hyper), sizeof(group.hyper));
    auto [found, fresh] = numbers.emplace(bytes, static_cast<uint32_t>(group_table_.size()));
    if (fresh) group_table_.push_back(group.hyper);
    group.table_row = found->second;
    group.columns = rule_.columns(rule_.variant(group.hyper, 0));
  }
  for (size_t r = 0; r < rows_.size(); ++r) rows_[r].group = groups_[owners_[r].group].table_row;
  hyper_changed_ = false;
}

// See Note [Canonical order].
void StepPlan::describe_param(size_t r) {
  Watch& watch = watches_[r];
  Owner& owner = owners_[r];
  rows_[r].numel = 0;
  watch.problem = foreign(watch.param);
  owner.order.clear();
  if (watch.problem) return;
  watch.param_signature.take(watch.param);
  watch.shape = shape_of(watch.param);
  owner.sizes.assign(watch.param->sizes().begin(), watch.param->sizes().end());
  owner.strides.assign(watch.param->strides().begin(), watch.param->strides().end());
  rows_[r].numel = watch.param->numel();
  for (size_t d = 0; d < owner.sizes.size(); ++d) {
    if (owner.sizes[d] != 1) owner.order.push_back(static_cast<int>(d));
  }
  std::stable_sort(owner.order.begin(), owner.order.end(),
                   [&](int a, int b) { return owner.strides[a] > owner.strides[b]; });
  watch.problem = describe_column(owner, owner.param, rows_[r].param, owner.param_layout, true);
}

const char* StepPlan::describe_column(Owner& owner, const at::Tensor& tensor, Column& column,
                                      std::unique_ptr<Layout>& layout, bool written) {
  const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (const char* problem = foreign(impl)) return problem;
  if (impl->sizes() != at::IntArrayRef(owner.sizes)) return "has another shape than its parameter";
  to_dtype(impl, column.dtype);
  layout.reset();
  column.layout = nullptr;
  if (impl->numel() == 0) return nullptr;

  const auto strides = impl->strides();
  bool flat = true;
  int64_t dense = 1;
  for (auto d = owner.order.rbegin(); d != owner.order.rend(); ++d) {
    flat &= strides[*d] == dense;
    dense *= owner.sizes[*d];
  }
  if (flat) return nullptr;
  if (written && at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
    return "has elements that share memory (an expanded tensor?)";
  }
  layout = std::make_unique<Layout>();
  layout->dims = 0;
  for (int d : owner.order) {
    const int last = layout->dims - 1;
    if (last >= 0 && layout->stride[last] == strides[d] * owner.sizes[d]) {
      layout->size[last] *= owner.sizes[d];
      layout->stride[last] = strides[d];
    } else if (layout->dims == kMaxDims) {
      return "has more than 16 dimensions that cannot be merged";
    } else {
      layout->size[layout->dims] = owner.sizes[d];
      layout->stride[layout->dims++] = strides[d];
    }
  }
  column.layout = layout.get();
  return nullptr;
}

// Returns false when the parameter is no longer what the tables say, for instance after `param.data = ...`.
bool StepPlan::refresh_param(size_t r) {
  Watch& watch = watches_[r];
  if (watch.problem || !watch.param_signature.matches(watch.param) || shape_of(watch.param) != watch.shape) {
    return false;
  }
  rows_[r].param.data = watch.param->mutable_data();
  return true;
}

const char* StepPlan::refresh_grad(size_t r, bool write_back) {
  Watch& watch = watches_[r];
  Column& column = rows_[r].grad;
  column.data = nullptr;
  const at::Tensor& grad = watch.param->grad();
  if (!grad.defined()) return nullptr;
  if (watch.problem) return watch.problem;
  if (watch.state_problem) return watch.state_problem;
  c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
  if (!watch.grad_signature.matches(impl)) {
    if (foreign(impl)) return "has a gradient that is not a plain dense CPU tensor";
    to_dtype(impl, column.dtype);
    watch.grad_signature.take(impl);
  }
  if (!rows_[r].param.layout && impl->strides() == watch.param->strides() && impl->sizes() == watch.param->sizes()) {
    column.layout = nullptr;
  } else if (describe_column(owners_[r], grad, column, owners_[r].grad_layout, write_back)) {
    return "has a gradient whose shape or memory layout cannot be used";
  }
  column.data = rows_[r].numel ? impl->mutable_data() : &kEmpty;
  return nullptr;
}

const char* StepPlan::refresh_state(size_t r) {
  Watch& watch = watches_[r];
  if (!watch.step) return nullptr;
  TensorRow& row = rows_[r];
  row.step = watch.step->mutable_data();
  for (int c = 0; c < rule_.state_count; ++c) {
    if (!watch.state[c]) continue;
    void* data = watch.state[c]->mutable_data();
    if (data != row.state[c].data) {
      Owner& owner = owners_[r];
      if (describe_column(owner, owner.state[c], row.state[c], owner.state_layout[c], true)) {
        return "has a state tensor whose shape, dtype, device or memory layout cannot be used";
      }
      row.state[c].data = data;
    }
  }
  return nullptr;
}

bool StepPlan::states_unchanged(const py::dict& state) const {
  size_t next = 0;
  return walk_state(
             state.ptr(),
             [&](PyObject* object) { return next < seen_states_.size() && seen_states_[next++].ptr() == object; }) &&
         next == seen_states_.size();
}

void StepPlan::resolve_states(const py::dict& state) {
  for (size_t r = 0; r < rows_.size(); ++r) {
    Owner& owner = owners_[r];
    Watch& watch = watches_[r];
    TensorRow& row = rows_[r];
    const unsigned columns = groups_[owner.group].columns;
    owner.step.reset();
    watch.step = nullptr;
    row.step = nullptr;
    watch.state_problem = nullptr;
    for (int c = 0; c < kMaxStates; ++c) {
      owner.state[c].reset();
      watch.state[c] = nullptr;
      row.state[c] = {};
    }
    if (!columns || watch.problem) continue;
    watch.state_problem = "has no state yet";
    PyObject* inner = PyDict_GetItemWithError(state.ptr(), owner.object.ptr());
    if (!inner && PyErr_Occurred()) throw py::error_already_set();
    if (!inner || !PyDict_Check(inner)) continue;
    auto tensor_named = [&](const char* name) {
      PyObject* value = PyDict_GetItemString(inner, name);
      return value && THPVariable_Check(value) ? THPVariable_Unpack(value) : at::Tensor();
    };
    const at::Tensor step = tensor_named("step");
    if (!step.defined()) continue;
    if (step.dim() || !step.is_cpu() || (step.scalar_type() != at::kFloat && step.scalar_type() != at::kDouble)) {
      watch.state_problem = "has a 'step' that is not a 0-dim float32 or float64 CPU tensor";
      continue;
    }
    bool complete = true;
    for (int c = 0; c < rule_.state_count; ++c) {
      if (!(columns >> c & 1)) continue;
      owner.state[c] = tensor_named(rule_.states[c]);
      complete &= owner.state[c].defined();
    }
    if (!complete) continue;
    owner.step = step;
    watch.step = step.unsafeGetTensorImpl();
    to_dtype(step.unsafeGetTensorImpl(), row.step_dtype);
    watch.state_problem = nullptr;
    for (int c = 0; c < rule_.state_count && !watch.state_problem; ++c) {
      if (!(columns >> c & 1)) continue;
      watch.state[c] = owner.state[c].unsafeGetTensorImpl();
      if (describe_column(owner, owner.state[c], row.state[c], owner.state_layout[c], true)) {
        watch.state_problem = "has a state tensor whose shape, dtype, device or memory layout cannot be used";
      }
      row.state[c].data = watch.state_problem ? nullptr : watch.state[c]->mutable_data();
    }
  }
  seen_states_.clear();
  walk_state(state.ptr(), [&](PyObject* object) {
    seen_states_.push_back(py::reinterpret_borrow<py::object>(object));
    return true;
  });
}

void StepPlan::build_chunks() {
  chunks_.clear();
  for (size_t r = 0; r < rows_.size(); ++r) {
    for (int64_t offset = 0; offset < rows_[r].numel; offset += cpu::kChunkElements) {
      const int64_t length = std::min(cpu::kChunkElements, rows_[r].numel - offset);
      chunks_.push_back({static_cast<uint32_t>(r), static_cast<uint32_t>(length), offset});
    }
  }
}

py::object StepPlan::refresh(const py::list& groups, const py::dict& state, bool write_back) {
  bool states_known = true;
  try {
    if (!groups_unchanged(groups)) {
      read_groups(groups);
      states_known = false;
    }
  } catch (...) {
    groups_.clear();  // half read: start afresh at the next step
    throw;
  }
  if (hyper_changed_) {
    std::vector<unsigned> columns;
    for (const Group& group : groups_) columns.push_back(group.columns);
    number_groups();
    for (size_t g = 0; g < groups_.size(); ++g) states_known &= columns[g] == groups_[g].columns;
  }

  bool moved = false;
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (refresh_param(r)) continue;
    const int64_t numel = rows_[r].numel;
    const bool had_problem = watches_[r].problem;
    describe_param(r);
    refresh_param(r);
    moved |= numel != rows_[r].numel;
    states_known &= had_problem && watches_[r].problem;
  }
  if (moved) build_chunks();
  if (!states_known || !states_unchanged(state)) resolve_states(state);

  elements_ = 0;
  any_active_ = any_double_ = false;
  std::vector<std::pair<size_t, const char*>> problems;
  for (size_t r = 0; r < rows_.size(); ++r) {
    TensorRow& row = rows_[r];
    const char* problem = refresh_grad(r, write_back);
    if (!problem && row.grad.data) {
      problem = refresh_state(r);
      elements_ += row.numel;
      any_active_ = true;
      any_double_ |= row.param.dtype == DType::kFloat64;
    }
    if (problem) problems.emplace_back(r, problem);
  }
  if (problems.empty()) return py::none();
  any_active_ = false;
  py::list out;
  for (auto [r, problem] : problems) out.append(py::make_tuple(owners_[r].group, owners_[r].index, problem));
  return out;
}

void StepPlan::derive_scalars() {
  struct Memo {
    double step = -1;
    uint32_t scalars = 0, variant = 0;
  };
  std::vector<Memo> memo(group_table_.size());
  scalars_.clear();
  for (TensorRow& row : rows_) {
    if (!row.grad.data) continue;
    double step = 0;
    if (row.step) {
      step = row.step_dtype == DType::kFloat64 ? *static_cast<double*>(row.step) : *static_cast<float*>(row.step);
    }
    step += 1;
    Memo& known = memo[row.group];
    if (known.step != step) {
      known = {step, static_cast<uint32_t>(scalars_.size()), rule_.variant(group_table_[row.group], step)};
      scalars_.emplace_back();
      rule_.derive(group_table_[row.group], step, &scalars_.back());
    }
    row.scalars = known.scalars;
    row.variant = known.variant;
  }
}

void StepPlan::finish_update(bool write_back) {
  for (size_t r = 0; r < rows_.size(); ++r) {
    const TensorRow& row = rows_[r];
    if (!row.grad.data) continue;
    if (row.step) {
      if (row.step_dtype == DType::kFloat64) {
        *static_cast<double*>(row.step) += 1;
      } else {
        *static_cast<float*>(row.step) += 1;
      }
    }
    watches_[r].param->bump_version();
    if (write_back) watches_[r].param->grad().unsafeGetTensorImpl()->bump_version();
  }
}

py::tuple StepPlan::step(const StepSettings& s) {
  const cpu::Work work{rows_, chunks_, elements_};
  const bool full = s.norm.kind != NormKind::kNone;
  double norm = 0, coefficient = 1;
  bool skip = s.has_found_inf && s.found_inf != 0;
  {
    py::gil_scoped_release unlocked;
    if ((full || s.check) && any_active_) {
      const cpu::Statistics found = cpu::statistics(work, s.norm, partials_);
      if (s.check) skip = found.nonfinite;
      norm = found.norm * s.inverse_scale;
    }
    if (full) {
      coefficient = clip_coefficient(norm, s.max_norm);
      if (s.error_if_nonfinite && !skip && !std::isfinite(norm)) {
        throw std::runtime_error("The total norm of the gradients is " + std::to_string(norm) +
                                 ", so it cannot be clipped. To disable this error and scale the gradients by the "
                                 "non-finite norm anyway, set `error_if_nonfinite=False`");
      }
    }
    if (!skip && any_active_) {
      derive_scalars();
      cpu::update(work, rule_.id, scalars_, {s.inverse_scale * coefficient, s.clip_value, s.write_back});
      finish_update(s.write_back);
    }
  }
  py::object scalars = py::none(), found_inf = py::none();
  if (full) {
    at::Tensor values = at::empty({2}, at::TensorOptions(any_double_ ? at::kDouble : at::kFloat));
    if (any_double_) {
      values.mutable_data_ptr<double>()[0] = norm;
      values.mutable_data_ptr<double>()[1] = coefficient;
    } else {
      values.mutable_data_ptr<float>()[0] = static_cast<float>(norm);
      values.mutable_data_ptr<float>()[1] = static_cast<float>(coefficient);
    }
    scalars = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(values)));
  }
  if (s.has_found_inf || (s.check && any_active_)) {
    at::Tensor value = at::empty({}, at::TensorOptions(at::kFloat));
    *value.mutable_data_ptr<float>() = skip ? 1.0f : 0.0f;
    found_inf = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value)));
  }
  return py::make_tuple(scalars, found_inf);
}

}  // namespace fusedopt
