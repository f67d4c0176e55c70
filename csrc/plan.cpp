#include "plan.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

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
    out = scalar_of(tensor);
    return true;
  }
  out = PyFloat_AsDouble(value);
  if (out == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return true;
}

// Visits every object in the state dict and the dicts in it, keys and values in their order, while visit returns true:
// visit(object, outer key, inner key), with the keys for the values of inner dicts and null for the rest.
template <class Visit>
bool walk_state(PyObject* state, Visit&& visit) {
  Py_ssize_t position = 0;
  PyObject *key, *value, *inner_key, *inner;
  while (PyDict_Next(state, &position, &key, &value)) {
    if (!visit(key, nullptr, nullptr) || !visit(value, nullptr, nullptr)) return false;
    if (!PyDict_Check(value)) continue;
    Py_ssize_t inner_position = 0;
    while (PyDict_Next(value, &inner_position, &inner_key, &inner)) {
      if (!visit(inner_key, nullptr, nullptr) || !visit(inner, key, inner_key)) return false;
    }
  }
  return true;
}

// The items of a list or tuple, held for as long as they are looked at.
class Items {
 public:
  Items(PyObject* sequence, const char* what) : fast_(PySequence_Fast(sequence, "")) {
    if (fast_) return;
    PyErr_Clear();
    throw py::type_error(std::string(what) + " is not a list");
  }
  ~Items() { Py_DECREF(fast_); }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  Py_ssize_t size() const { return PySequence_Fast_GET_SIZE(fast_); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_, i); }

 private:
  PyObject* fast_;
};

std::string place(Py_ssize_t group, Py_ssize_t index) {
  return "param_groups[" + std::to_string(group) + "]['params'][" + std::to_string(index) + "]";
}

// Hash of sizes and strides (FNV-1a over words).
uint64_t shape_of(const c10::TensorImpl* impl) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (int64_t size : impl->sizes()) hash = (hash ^ static_cast<uint64_t>(size)) * 0x100000001b3u;
  for (int64_t stride : impl->strides()) hash = (hash ^ static_cast<uint64_t>(stride)) * 0x100000001b3u;
  return hash;
}

// A step of fewer elements than this keeps the GIL: it is over before another thread would have got it.
constexpr int64_t kUnlockElements = 1 << 18;

// Note [Cold caches]
// After a forward and backward pass nothing of an optimizer's objects is in the caches, and a step of many small
// tensors is one long chase: parameter, autograd metadata, gradient, storage, state dict, state tensors, data. Followed
// one parameter after the other, each miss waits for the one before. So short loops run ahead of the real ones and have
// the misses of many parameters under way together, one level of the chase at a time. An address kept from an earlier
// step is only ever prefetched, which does no harm whatever lies there now.
void prefetch_lines(const void* object, size_t bytes) {
  for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(object) + line);
}

void prefetch_storage(c10::TensorImpl* impl) {
  if (impl->has_storage()) __builtin_prefetch(impl->unsafe_storage().unsafeGetStorageImpl());
}

// Objects of the state dicts that lie between prefetching one and looking at it, and the size of a small dict's
// entries.
constexpr size_t kAhead = 24, kDictEntriesBytes = 192;
// Of a TensorImpl, up to its dtype and key set.
constexpr size_t kTensorBytes = 192;
// Longer columns are left to the hardware.
constexpr int64_t kPrefetchElements = 128;

// Stands for the data of an empty gradient, whose own pointer is null: null means "takes no part".
char kEmpty;

// A problem that creating the state mends; compared by address.
const char* const kNoState = "has no state yet";

}  // namespace

double scalar_of(const at::Tensor& tensor) {
  // Around torch's dispatcher for the usual ones: it costs more than the rest of a small step's preparation.
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!foreign(impl) && impl->numel() == 1) {
    if (tensor.scalar_type() == at::kFloat) return *static_cast<const float*>(impl->data());
    if (tensor.scalar_type() == at::kDouble) return *static_cast<const double*>(impl->data());
  }
  return tensor.item<double>();
}

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

void StepPlan::read_value(Group& group, Py_ssize_t group_index, GroupEntry& entry) {
  const HyperKey& key = rule_.keys[entry.hyper_key];
  double* slots = group.hyper + key.slot;
  PyObject* value = entry.value.ptr();
  bool ok = true;
  // Numbers of Python's own never change in place; tensors, numpy arrays and lists may.
  auto fixed = [](PyObject* object) { return PyFloat_CheckExact(object) || PyLong_CheckExact(object); };
  if (key.arity == HyperKey::kFlag) {
    const int truth = PyObject_IsTrue(value);
    ok = truth >= 0;
    if (!ok) PyErr_Clear();
    slots[0] = truth;
    entry.live = !PyBool_Check(value);
  } else if (key.arity == 1) {
    ok = to_double(value, slots[0]);
    entry.live = !fixed(value);
  } else {
    PyObject* sequence = PySequence_Fast(value, "");
    if (!sequence) PyErr_Clear();
    ok = sequence && PySequence_Fast_GET_SIZE(sequence) == key.arity;
    entry.live = !PyTuple_CheckExact(value);
    for (int i = 0; ok && i < key.arity; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(sequence, i);
      ok = to_double(item, slots[i]);
      entry.live |= !fixed(item);
    }
    Py_XDECREF(sequence);
  }
  if (!ok) {
    throw py::type_error("param_groups[" + std::to_string(group_index) + "]['" + key.key + "'] is " +
                         py::repr(entry.value).cast<std::string>() + "; expected " +
                         (key.arity == HyperKey::kFlag ? "True or False"
                          : key.arity == 1             ? "a number or a 1-element tensor"
                                                       : "two numbers or 1-element tensors"));
  }
  hyper_changed_ = true;
}

bool StepPlan::groups_unchanged(PyObject* groups) {
  const Items list(groups, "param_groups");
  if (list.size() != static_cast<Py_ssize_t>(groups_.size())) return false;
  size_t row = 0;
  for (Py_ssize_t g = 0; g < list.size(); ++g) {
    Group& group = groups_[g];
    if (!PyDict_Check(list[g])) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value, *params_value = nullptr;
    size_t e = 0;
    while (PyDict_Next(list[g], &position, &key, &value)) {
      if (e == group.entries.size() || group.entries[e].key.ptr() != key) return false;
      GroupEntry& entry = group.entries[e++];
      if (entry.hyper_key == kParams) params_value = value;
      if (entry.hyper_key < 0) continue;
      const bool replaced = entry.value.ptr() != value;
      if (replaced) entry.value = py::reinterpret_borrow<py::object>(value);
      if (replaced || entry.live) read_value(group, g, entry);
    }
    if (e != group.entries.size()) return false;
    const Items params(params_value, "params");
    for (Py_ssize_t i = 0; i < params.size(); ++i, ++row) {
      if (row == watches_.size() || watches_[row].object != params[i] || watches_[row].group != g) return false;
      if (!THPVariable_Check(params[i])) return false;
    }
  }
  return row == watches_.size();
}

void StepPlan::read_groups(PyObject* groups) {
  groups_.clear();
  rows_.clear();
  owners_.clear();
  watches_.clear();
  states_known_ = false;
  hyper_changed_ = true;
  std::unordered_set<PyObject*> known;
  const Items list(groups, "param_groups");
  for (Py_ssize_t g = 0; g < list.size(); ++g) {
    const std::string name = "param_groups[" + std::to_string(g) + "]";
    if (!PyDict_Check(list[g])) throw py::type_error(name + " is not a dict");
    Group group{};
    bool found[kMaxHyper] = {};
    for (auto item : py::reinterpret_borrow<py::dict>(list[g])) {
      GroupEntry entry{py::reinterpret_borrow<py::object>(item.first), py::object(), kOther, false};
      if (PyUnicode_Check(entry.key.ptr()) && PyUnicode_CompareWithASCIIString(entry.key.ptr(), "params") == 0) {
        entry.hyper_key = kParams;
      }
      for (int k = 0; k < rule_.key_count && PyUnicode_Check(entry.key.ptr()); ++k) {
        if (PyUnicode_CompareWithASCIIString(entry.key.ptr(), rule_.keys[k].key) != 0) continue;
        entry.hyper_key = k;
        entry.value = py::reinterpret_borrow<py::object>(item.second);
        found[k] = true;
        read_value(group, g, entry);
      }
      group.entries.push_back(std::move(entry));
    }
    for (int k = 0; k < rule_.key_count; ++k) {
      if (!found[k]) throw py::key_error(name + " has no '" + rule_.keys[k].key + "'");
    }
    PyObject* params_value = PyDict_GetItemString(list[g], "params");
    if (!params_value) throw py::key_error(name + " has no 'params'");
    const Items params(params_value, (name + "['params']").c_str());
    for (Py_ssize_t i = 0; i < params.size(); ++i) {
      if (!THPVariable_Check(params[i])) throw py::type_error(place(g, i) + " is not a tensor");
      // Two threads would write one parameter.
      if (!known.insert(params[i]).second) throw py::value_error(place(g, i) + " is in the optimizer already");
      watches_.push_back(
          {params[i], static_cast<uint32_t>(g), static_cast<uint32_t>(i), {}, {}, {}, {}, nullptr, nullptr});
      owners_.emplace_back();
      rows_.push_back({});
      describe_param(rows_.size() - 1);
    }
    groups_.push_back(std::move(group));
  }
  build_chunks();
}

// Gives equal sets of hyperparameters one row of the group table: 400 groups are rarely 400 values.
void StepPlan::number_groups() {
  std::unordered_map<std::string_view, uint32_t> numbers;
  group_table_.clear();
  for (Group& group : groups_) {
    const unsigned columns = group.columns;
    const std::string_view bytes(reinterpret_cast<const char*>(group.hyper), sizeof(group.hyper));
    auto [found, fresh] = numbers.emplace(bytes, static_cast<uint32_t>(group_table_.size()));
    if (fresh) group_table_.push_back(group.hyper);
    group.table_row = found->second;
    group.columns = rule_.columns(rule_.variant(group.hyper, 0));
    states_known_ &= columns == group.columns;
  }
  for (size_t r = 0; r < rows_.size(); ++r) rows_[r].group = groups_[watches_[r].group].table_row;
  hyper_changed_ = false;
}

void StepPlan::Watched::take(c10::TensorImpl* now) {
  impl = now;
  signature.take(now);
  shape = shape_of(now);
}

bool StepPlan::Watched::unchanged() const { return signature.matches(impl) && shape == shape_of(impl); }

// See Note [Canonical order].
void StepPlan::describe_param(size_t r) {
  Watch& watch = watches_[r];
  Owner& owner = owners_[r];
  const at::Tensor& param = THPVariable_Unpack(watch.object);
  const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  rows_[r].numel = 0;
  watch.problem = foreign(impl);
  owner.order.clear();
  if (watch.problem) return;
  watch.param.take(param.unsafeGetTensorImpl());
  owner.sizes.assign(impl->sizes().begin(), impl->sizes().end());
  rows_[r].numel = impl->numel();
  for (size_t d = 0; d < owner.sizes.size(); ++d) {
    if (owner.sizes[d] != 1) owner.order.push_back(static_cast<int>(d));
  }
  std::stable_sort(owner.order.begin(), owner.order.end(),
                   [&](int a, int b) { return impl->stride(a) > impl->stride(b); });
  watch.problem = describe_column(owner, param, rows_[r].param, owner.param_layout, true);
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
  watch.param.impl = THPVariable_Unpack(watch.object).unsafeGetTensorImpl();
  if (watch.problem || !watch.param.unchanged()) return false;
  rows_[r].param.data = watch.param.impl->mutable_data();
  return true;
}

const char* StepPlan::refresh_grad(size_t r, bool write_back) {
  Watch& watch = watches_[r];
  Column& column = rows_[r].grad;
  column.data = nullptr;
  const at::Tensor& grad = watch.param.impl->grad();
  if (!grad.defined()) return nullptr;
  if (watch.problem) return watch.problem;
  if (watch.state_problem) return watch.state_problem;
  c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
  if (!watch.grad_signature.matches(impl)) {
    if (foreign(impl)) return "has a gradient that is not a plain dense CPU tensor";
    to_dtype(impl, column.dtype);
    watch.grad_signature.take(impl);
  }
  if (!rows_[r].param.layout && impl->strides() == watch.param.impl->strides() &&
      impl->sizes() == watch.param.impl->sizes()) {
    column.layout = nullptr;
  } else if (describe_column(owners_[r], grad, column, owners_[r].grad_layout, write_back)) {
    return "has a gradient whose shape or memory layout cannot be used";
  }
  column.data = rows_[r].numel ? impl->mutable_data() : &kEmpty;
  return column.data ? nullptr : "has a gradient without memory (its storage was freed?)";
}

// Returns false when a state tensor is no longer what the tables say, for instance after `state.data = ...`.
bool StepPlan::refresh_state(size_t r) {
  Watch& watch = watches_[r];
  if (!watch.step.impl) return true;
  TensorRow& row = rows_[r];
  if (!watch.step.unchanged()) return false;
  row.step = watch.step.impl->mutable_data();
  for (int c = 0; c < rule_.state_count; ++c) {
    if (!watch.state[c].impl) continue;
    if (!watch.state[c].unchanged()) return false;
    row.state[c].data = watch.state[c].impl->mutable_data();
  }
  return true;
}

// Compares the state dicts with what was seen, and takes the tensors of this step from them on the way.
bool StepPlan::states_unchanged(PyObject* state) {
  size_t next = 0;
  auto compare = [&](PyObject* object, PyObject*, PyObject*) {
    if (next == seen_states_.size() || seen_states_[next].object != object) return false;
    if (next + 2 * kAhead < seen_states_.size()) {
      __builtin_prefetch(seen_states_[next + 2 * kAhead].object);
      if (const void* entries = seen_states_[next + kAhead].entries) prefetch_lines(entries, kDictEntriesBytes);
    }
    const SeenState& seen = seen_states_[next++];
    if (seen.column == kNoColumn) return true;
    if (!THPVariable_Check(object)) return false;
    Watch& watch = watches_[seen.row];
    Watched& column = seen.column == kStepColumn ? watch.step : watch.state[seen.column];
    column.impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
    return true;
  };
  return walk_state(state, compare) && next == seen_states_.size();
}

// Why the state cannot be used, or null. Sets the row's columns.
const char* StepPlan::resolve_state(size_t r, PyObject* inner) {
  Owner& owner = owners_[r];
  Watch& watch = watches_[r];
  TensorRow& row = rows_[r];
  const unsigned columns = groups_[watch.group].columns;
  auto tensor_named = [&](const char* name) {
    PyObject* value = PyDict_GetItemString(inner, name);
    return value && THPVariable_Check(value) ? THPVariable_Unpack(value) : at::Tensor();
  };
  const at::Tensor step = tensor_named("step");
  if (!step.defined()) return kNoState;
  if (foreign(step.unsafeGetTensorImpl()) || step.dim() || !to_dtype(step.unsafeGetTensorImpl(), row.step_dtype) ||
      (row.step_dtype != DType::kFloat32 && row.step_dtype != DType::kFloat64)) {
    return kNoState;  // its initialization converts it
  }
  for (int c = 0; c < rule_.state_count; ++c) {
    if (!(columns >> c & 1)) continue;
    const at::Tensor tensor = tensor_named(rule_.states[c]);
    if (!tensor.defined()) return kNoState;
    if (describe_column(owner, tensor, row.state[c], owner.state_layout[c], true)) {
      return "has a state tensor whose shape, dtype, device or memory layout cannot be used";
    }
  }
  for (int c = 0; c < rule_.state_count; ++c) {
    if (columns >> c & 1) watch.state[c].take(tensor_named(rule_.states[c]).unsafeGetTensorImpl());
  }
  watch.step.take(step.unsafeGetTensorImpl());
  return nullptr;
}

void StepPlan::resolve_states(PyObject* state) {
  std::unordered_map<PyObject*, uint32_t> row_of;
  for (size_t r = 0; r < rows_.size(); ++r) {
    Watch& watch = watches_[r];
    row_of.emplace(watch.object, static_cast<uint32_t>(r));
    watch.step = {};
    rows_[r].step = nullptr;
    for (int c = 0; c < kMaxStates; ++c) {
      watch.state[c] = {};
      rows_[r].state[c] = {};
    }
    watch.state_problem = groups_[watch.group].columns && !watch.problem ? kNoState : nullptr;
  }
  Py_ssize_t position = 0;
  PyObject *key, *inner;
  while (PyDict_Next(state, &position, &key, &inner)) {
    const auto found = row_of.find(key);
    if (found == row_of.end() || !PyDict_Check(inner)) continue;
    const char*& problem = watches_[found->second].state_problem;
    if (problem) problem = resolve_state(found->second, inner);
  }
  seen_states_.clear();
  walk_state(state, [&](PyObject* object, PyObject* outer, PyObject* name) {
    SeenState seen{object, nullptr, 0, kNoColumn};
    if (PyDict_CheckExact(object)) seen.entries = reinterpret_cast<PyDictObject*>(object)->ma_keys;
    const auto found = outer ? row_of.find(outer) : row_of.end();
    if (found != row_of.end() && THPVariable_Check(object)) {
      seen.row = found->second;
      const Watch& watch = watches_[seen.row];
      const c10::TensorImpl* impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
      auto named = [&](const char* wanted) {
        return PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, wanted) == 0;
      };
      if (watch.step.impl == impl && named("step")) seen.column = kStepColumn;
      for (int c = 0; c < rule_.state_count; ++c) {
        if (watch.state[c].impl == impl && named(rule_.states[c])) seen.column = static_cast<int8_t>(c);
      }
    }
    seen_states_.push_back(seen);
    return true;
  });
  states_known_ = true;
}

// The levels below a parameter that refresh_param() and refresh_grad() will read.
void StepPlan::prefetch_params() const {
  auto param = [](const Watch& watch) { return THPVariable_Unpack(watch.object).unsafeGetTensorImpl(); };
  for (const Watch& watch : watches_) prefetch_lines(param(watch), kTensorBytes);
  for (const Watch& watch : watches_) __builtin_prefetch(param(watch)->autograd_meta());
  for (const Watch& watch : watches_) {
    const at::Tensor& grad = param(watch)->grad();
    if (grad.defined()) prefetch_lines(grad.unsafeGetTensorImpl(), kTensorBytes);
    prefetch_storage(param(watch));
  }
  for (const Watch& watch : watches_) {
    const at::Tensor& grad = param(watch)->grad();
    if (grad.defined()) prefetch_storage(grad.unsafeGetTensorImpl());
  }
}

void StepPlan::prefetch_states() const {
  auto each = [&](auto&& visit) {
    for (const Watch& watch : watches_) {
      if (!watch.step.impl) continue;
      visit(watch.step.impl);
      for (const Watched& state : watch.state) {
        if (state.impl) visit(state.impl);
      }
    }
  };
  each([](c10::TensorImpl* impl) { prefetch_lines(impl, kTensorBytes); });
  each(prefetch_storage);
}

void StepPlan::prefetch_data() const {
  for (const TensorRow& row : rows_) {
    if (!row.grad.data || row.numel > kPrefetchElements) continue;
    auto prefetch = [&](const Column& column) {
      if (column.data) prefetch_lines(column.data, static_cast<size_t>(row.numel * element_size(column.dtype)));
    };
    if (row.step) __builtin_prefetch(row.step);
    prefetch(row.grad);
    prefetch(row.param);
    for (const Column& state : row.state) prefetch(state);
  }
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

// Distinct parameters may share memory, as views of one tensor. torch updates them one after the other, and so do we
// then: a single thread walks the rows in order.
void StepPlan::find_overlaps() {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const TensorRow& row : rows_) {
    if (!row.numel || !row.param.data) continue;
    int64_t extent = row.numel;
    if (const Layout* layout = row.param.layout) {
      extent = 1;
      for (int d = 0; d < layout->dims; ++d) extent += (layout->size[d] - 1) * layout->stride[d];
    }
    const auto begin = reinterpret_cast<uintptr_t>(row.param.data);
    ranges.emplace_back(begin, begin + static_cast<uintptr_t>(extent * element_size(row.param.dtype)));
  }
  std::sort(ranges.begin(), ranges.end());
  overlaps_ = false;
  for (size_t i = 1; i < ranges.size(); ++i) overlaps_ |= ranges[i].first < ranges[i - 1].second;
}

py::object StepPlan::refresh(PyObject* groups, PyObject* state, bool write_back) {
  any_active_ = any_double_ = false;
  try {
    if (!groups_unchanged(groups)) read_groups(groups);
  } catch (...) {
    groups_.clear();  // half read: start afresh at the next step
    throw;
  }
  if (hyper_changed_) number_groups();

  bool resized = false, moved = false;
  prefetch_params();
  for (size_t r = 0; r < rows_.size(); ++r) {
    const void* data = rows_[r].param.data;
    if (!refresh_param(r)) {
      const int64_t numel = rows_[r].numel;
      const bool had_problem = watches_[r].problem;
      describe_param(r);
      refresh_param(r);
      resized |= numel != rows_[r].numel;
      states_known_ &= had_problem && watches_[r].problem;
    }
    moved |= data != rows_[r].param.data;
  }
  if (resized) build_chunks();
  if (moved) find_overlaps();

  if (!states_known_ || !states_unchanged(state)) resolve_states(state);
  prefetch_states();
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (refresh_state(r)) continue;
    resolve_states(state);
    for (size_t again = 0; again < rows_.size(); ++again) refresh_state(again);
    break;
  }

  elements_ = 0;
  py::list problems;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const TensorRow& row = rows_[r];
    if (const char* problem = refresh_grad(r, write_back)) {
      problems.append(py::make_tuple(watches_[r].group, watches_[r].index, problem, problem == kNoState));
    }
    if (!row.grad.data) continue;
    elements_ += row.numel;
    any_active_ = true;
    any_double_ |= row.param.dtype == DType::kFloat64;
  }
  return problems.empty() ? py::object(py::none()) : py::object(problems);
}

void StepPlan::derive_scalars() {
  struct Memo {
    double step = std::numeric_limits<double>::quiet_NaN();
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
  // Counting a version up is an atomic operation, which waits for its miss and everything before it: read them first.
  uint32_t versions = 0;
  for (size_t r = 0; r < rows_.size(); ++r) {
    c10::TensorImpl* impl = watches_[r].param.impl;
    if (rows_[r].grad.data && !impl->is_inference()) versions += impl->version_counter().current_version();
  }
  asm volatile("" : : "r"(versions));
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
    auto bump = [](c10::TensorImpl* impl) {
      if (!impl->is_inference()) impl->bump_version();
    };
    bump(watches_[r].param.impl);
    const at::Tensor& grad = watches_[r].param.impl->grad();
    if (write_back && grad.defined()) bump(grad.unsafeGetTensorImpl());
  }
}

py::object StepPlan::step(const py::object& groups, const py::dict& state, const StepSettings& s) {
  // The passes run without the GIL, so another thread may get here, or drop what they work on.
  if (running_) throw std::runtime_error("a step of this optimizer is running in another thread");
  py::object problems = refresh(groups.ptr(), state.ptr(), s.write_back);
  if (!problems.is_none()) return problems;

  prefetch_data();
  const cpu::Work work{rows_, chunks_, elements_, overlaps_};
  const bool full = s.mode() == Mode::kFull;
  double norm = 0, coefficient = 1;
  bool skip = s.has_found_inf && s.found_inf != 0;
  if (any_active_) {
    derive_scalars();
    std::vector<at::Tensor> held;
    std::optional<py::gil_scoped_release> unlocked;
    struct Running {
      bool& flag;
      explicit Running(bool& f) : flag(f) { flag = true; }
      ~Running() { flag = false; }
    } running(running_);
    if (elements_ >= kUnlockElements) {
      auto hold = [&](c10::TensorImpl* impl) {
        if (impl) held.emplace_back(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(impl));
      };
      for (size_t r = 0; r < rows_.size(); ++r) {
        if (!rows_[r].grad.data) continue;
        hold(watches_[r].param.impl);
        held.push_back(watches_[r].param.impl->grad());
        hold(watches_[r].step.impl);
        for (const Watched& column : watches_[r].state) hold(column.impl);
      }
      unlocked.emplace();
    }
    if (s.mode() != Mode::kBare) {
      const cpu::Statistics found = cpu::statistics(work, s.norm, partials_);
      if (s.check) skip = found.nonfinite;
      norm = found.norm * s.inverse_scale;
    }
    if (full) coefficient = clip_coefficient(norm, s.max_norm);
    const bool refused = full && s.error_if_nonfinite && !skip && !std::isfinite(norm);
    if (!skip && !refused) {
      cpu::update(work, rule_.id, scalars_, {s.inverse_scale * coefficient, s.clip_value, s.write_back});
    }
    unlocked.reset();
    if (refused) {
      throw std::runtime_error("The total norm of the gradients is " + std::to_string(norm) +
                               ", so it cannot be clipped. To disable this error and scale the gradients by the "
                               "non-finite norm anyway, set `error_if_nonfinite=False`");
    }
    if (!skip) finish_update(s.write_back);
  }
  py::object scalars = py::none(), found_inf = py::none();
  if (full) {
    at::Tensor values = at::detail::empty_cpu({2}, any_double_ ? at::kDouble : at::kFloat);
    if (any_double_) {
      static_cast<double*>(values.mutable_data_ptr())[0] = norm;
      static_cast<double*>(values.mutable_data_ptr())[1] = coefficient;
    } else {
      static_cast<float*>(values.mutable_data_ptr())[0] = static_cast<float>(norm);
      static_cast<float*>(values.mutable_data_ptr())[1] = static_cast<float>(coefficient);
    }
    scalars = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(values)));
  }
  if (s.has_found_inf || (s.check && any_active_)) {
    at::Tensor value = at::detail::empty_cpu({}, at::kFloat);
    *static_cast<float*>(value.mutable_data_ptr()) = skip ? 1.0f : 0.0f;
    found_inf = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(value)));
  }
  return py::make_tuple(scalars, found_inf);
}

}  // namespace fusedopt
