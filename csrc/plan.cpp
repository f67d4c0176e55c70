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
#include "cuda/launchers.h"
#include "python_launcher.h"

namespace fusedopt {
namespace {

// The value of a one-element tensor.
double scalar_of(const at::Tensor& tensor) {
  // Around torch's dispatcher for the usual ones: it costs more than the rest of a small step's preparation.
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (!foreign(impl, at::kCPU) && impl->numel() == 1) {
    if (tensor.scalar_type() == at::kFloat) return *static_cast<const float*>(impl->data());
    if (tensor.scalar_type() == at::kDouble) return *static_cast<const double*>(impl->data());
  }
  return tensor.item<double>();
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
  const void* begin() const { return PySequence_Fast_ITEMS(fast_); }
  PyObject* operator[](Py_ssize_t i) const { return PySequence_Fast_GET_ITEM(fast_, i); }

 private:
  PyObject* fast_;
};

std::string place(Py_ssize_t group, Py_ssize_t index) {
  return "param_groups[" + std::to_string(group) + "]['params'][" + std::to_string(index) + "]";
}

// A step of fewer elements than this keeps the GIL: it is over before another thread would have got it.
constexpr int64_t kUnlockElements = 1 << 18;

// Note [Cold caches]
// After a forward and backward pass nothing of an optimizer's objects is in the caches, and a step of many small
// tensors is one long chase: parameter, autograd metadata, gradient, storage, state dict, state tensors. Followed one
// after the other, each miss waits for the one before. So every loop over rows prefetches, some rows ahead, all that
// the last step went through: an address kept from an earlier step is only ever prefetched, which does no harm whatever
// lies there now.
constexpr size_t kAhead = 8;
// Of the entries of a group's dict and of a state dict.
constexpr size_t kGroupBytes = 256, kStateBytes = 88;

// A number that no other dict has, nor this one after a change; 0 where Python does not tell. (It still has the number
// in 3.12 and 3.13, deprecated.)
uint64_t version_of(PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000 && !defined(FUSEDOPT_NO_DICT_VERSIONS)
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  (void)dict;
  return 0;
#endif
}

// What a weak reference refers to, for comparing only, or null.
PyObject* referent(PyObject* reference) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object = nullptr;
  if (PyWeakref_GetRef(reference, &object) < 0) PyErr_Clear();
  Py_XDECREF(object);
  return object;
#else
  return PyWeakref_GET_OBJECT(reference);
#endif
}

// The table of a dict's entries, for prefetching only.
const void* entries_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_keys; }

// Stands for the data of an empty gradient, whose own pointer is null: null means "takes no part".
char kEmpty;

// A problem that creating the state mends; compared by address.
const char* const kNoState = "has no state yet";

}  // namespace

Number StepPlan::number(const py::object& value) const {
  if (!THPVariable_Check(value.ptr())) return {value.cast<double>()};
  const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
  if (runner_ && tensor.device().type() == device_ && tensor.numel() == 1) return {0, &tensor};
  return {scalar_of(tensor)};
}

StepPlan::StepPlan(const std::string& rule, const std::string& device, int emulated_devices, const py::object& object)
    : rule_(rule_named(rule)), emulated_devices_(emulated_devices) {
  std::function<void*(int)> stream_of = [](int) -> void* { return nullptr; };
  auto streams_from = [&](const py::object& current) {
    stream_of = [current](int index) { return reinterpret_cast<void*>(current(index).cast<uintptr_t>()); };
  };
  const device::Launcher* launcher = nullptr;
  if (!object.is_none()) {
    device_ = c10::Device(device).type();
    launcher_ = std::make_unique<device::Launcher>(python_launcher(object, device_));
    launcher = launcher_.get();
    streams_from(object.attr("stream"));
  } else if (device == "cpu") {
    return;
  } else if (device == "emulated") {
    launcher = cuda::emulated_launcher();
  } else if (device == "cuda") {
    device_ = at::kCUDA;
    launcher = cuda::gpu_launcher();
    // torch's C++ way would make the module depend on a CUDA build of torch.
    streams_from(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  }
  if (!launcher) throw std::invalid_argument("this build has no kernels for the device '" + device + "'");
  runner_ = std::make_unique<device::Executor>(*launcher, device_, std::move(stream_of));
}

// A hyperparameter; one that is a tensor on the plan's device is left there.
bool StepPlan::read_number(PyObject* value, HyperValues& hyper, int slot) {
  hyper.live[slot] = nullptr;
  if (runner_ && THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (tensor.device().type() == device_) {
      if (tensor.numel() != 1) return false;
      // NaN is unequal to everything, so that no state is taken for one that is not needed.
      hyper.value[slot] = std::numeric_limits<double>::quiet_NaN();
      hyper.live[slot] = tensor.unsafeGetTensorImpl();
      return true;
    }
  }
  return to_double(value, hyper.value[slot]);
}

void StepPlan::read_value(Group& group, Py_ssize_t group_index, GroupEntry& entry) {
  const HyperKey& key = rule_.keys[entry.hyper_key];
  PyObject* value = entry.value.ptr();
  bool ok = true;
  // Numbers of Python's own never change in place; tensors, numpy arrays and lists may.
  auto fixed = [](PyObject* object) { return PyFloat_CheckExact(object) || PyLong_CheckExact(object); };
  auto note_kind = [&](PyObject* object) {
    foreign_numbers_ |= !fixed(object) && !PyBool_Check(object) && !THPVariable_Check(object);
  };
  if (key.arity == HyperKey::kFlag) {
    const int truth = PyObject_IsTrue(value);
    ok = truth >= 0;
    if (!ok) PyErr_Clear();
    group.hyper.value[key.slot] = truth;
    entry.live = !PyBool_Check(value);
    note_kind(value);
  } else if (key.arity == 1) {
    ok = read_number(value, group.hyper, key.slot);
    entry.live = !fixed(value);
    note_kind(value);
  } else {
    PyObject* sequence = PySequence_Fast(value, "");
    if (!sequence) PyErr_Clear();
    ok = sequence && PySequence_Fast_GET_SIZE(sequence) == key.arity;
    entry.live = !PyTuple_CheckExact(value);
    for (int i = 0; ok && i < key.arity; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(sequence, i);
      ok = read_number(item, group.hyper, key.slot + i);
      entry.live |= !fixed(item);
      note_kind(item);
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

// See Note [Prefetching].
[[gnu::always_inline]] inline void StepPlan::prefetch_group(size_t g, PyObject* dict) const {
  const Group& group = groups_[g];
  prefetch(dict, sizeof(PyDictObject));
  if (!group.version) prefetch(group.dict_entries, kGroupBytes);
  prefetch(group.params, sizeof(PyListObject));
  __builtin_prefetch(group.items);
}

[[gnu::always_inline]] inline void StepPlan::prefetch_row(size_t r) const {
  const Watch& watch = watches_[r];
  __builtin_prefetch(watch.object);
  __builtin_prefetch(watch.autograd);
  prefetch_tensor(watch.param.impl, true);
  prefetch_storage(watch.param.form.storage);
  prefetch_tensor(watch.grad.impl, true);
  prefetch_storage(watch.grad.form.storage);
}

[[gnu::always_inline]] inline void StepPlan::prefetch_state(size_t e) const {
  const StateEntry& entry = state_entries_[e];
  const Watch& watch = watches_[entry.row];
  prefetch(entry.dict, sizeof(PyDictObject));
  if (!entry.version) prefetch(entry.dict_entries, kStateBytes);
  for (const void* object : entry.objects) __builtin_prefetch(object);
  if (!entry.version) __builtin_prefetch(entry.counted);
  prefetch_tensor(watch.step.impl, false);
  prefetch_storage(watch.step.form.storage);
  __builtin_prefetch(rows_[entry.row].step);
  for (const Watched& column : watch.state) {
    if (!column.impl) continue;
    prefetch_tensor(column.impl, !column.form.contiguous);
    prefetch_storage(column.form.storage);
  }
}

bool StepPlan::groups_unchanged(PyObject* groups) {
  const Items list(groups, "param_groups");
  const size_t count = groups_.size();
  if (list.size() != static_cast<Py_ssize_t>(count)) return false;
  size_t row = 0;
  for (size_t g = 0; g < count; ++g) {
    if (g + kAhead < count) prefetch_group(g + kAhead, list[static_cast<Py_ssize_t>(g + kAhead)]);
    Group& group = groups_[g];
    if (list.size() != static_cast<Py_ssize_t>(count)) return false;
    PyObject* const dict = list[static_cast<Py_ssize_t>(g)];
    if (!PyDict_Check(dict)) return false;
    const uint64_t version = version_of(dict);
    const bool changed = !version || version != group.version;
    py::object alive;  // while hyperparameters are read, which may run Python
    if (changed || group.live) alive = py::reinterpret_borrow<py::object>(dict);
    if (changed) {
      group.live = false;
      for (GroupEntry& entry : group.entries) {
        Py_ssize_t position = entry.position;
        PyObject *key, *value;
        if (!PyDict_Next(dict, &position, &key, &value) || key != entry.key.ptr()) return false;
        if (entry.hyper_key == kParams) {
          group.params = value;
          continue;
        }
        const bool replaced = entry.value.ptr() != value;
        if (replaced) entry.value = py::reinterpret_borrow<py::object>(value);
        if (replaced || entry.live) read_value(group, static_cast<Py_ssize_t>(g), entry);
        group.live |= entry.live;
      }
      group.version = version;
      group.dict_entries = entries_of(dict);
    } else if (group.live) {
      for (GroupEntry& entry : group.entries) {
        if (entry.live) read_value(group, static_cast<Py_ssize_t>(g), entry);
      }
    }
    const Items params(group.params, "params");
    const auto size = static_cast<size_t>(params.size());
    if (size > watches_.size() - row || (row + size < watches_.size() && watches_[row + size].group == g)) return false;
    for (size_t i = 0; i < size; ++i, ++row) {
      const Watch& watch = watches_[row];
      PyObject* const param = params[static_cast<Py_ssize_t>(i)];
      if (watch.object != param || watch.group != g || !THPVariable_Check(param)) return false;
    }
    group.items = size ? params.begin() : nullptr;
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
    Py_ssize_t next = 0;
    PyObject *key, *value;
    while (PyDict_Next(list[g], &next, &key, &value)) {
      if (!PyUnicode_Check(key)) continue;
      GroupEntry entry{py::reinterpret_borrow<py::object>(key), py::object(), next - 1, kParams, false};
      if (PyUnicode_CompareWithASCIIString(key, "params") == 0) {
        group.entries.push_back(std::move(entry));
        continue;
      }
      for (int k = 0; k < rule_.key_count; ++k) {
        if (PyUnicode_CompareWithASCIIString(key, rule_.keys[k].key) != 0) continue;
        entry.hyper_key = k;
        entry.value = py::reinterpret_borrow<py::object>(value);
        found[k] = true;
        read_value(group, g, entry);
        group.entries.push_back(std::move(entry));
        break;
      }
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
      Watch watch{};
      watch.object = params[i];
      watch.group = static_cast<uint32_t>(g);
      watch.index = static_cast<uint32_t>(i);
      watches_.push_back(watch);
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
    const std::string_view bytes(reinterpret_cast<const char*>(&group.hyper), sizeof(group.hyper));
    auto [found, fresh] = numbers.emplace(bytes, static_cast<uint32_t>(group_table_.size()));
    if (fresh) group_table_.push_back(&group.hyper);
    group.table_row = found->second;
    group.columns = rule_.columns(rule_.variant(group.hyper.value, 0));
    states_known_ &= columns == group.columns;
  }
  for (size_t r = 0; r < rows_.size(); ++r) rows_[r].group = groups_[watches_[r].group].table_row;
  hyper_changed_ = false;
}

// See Note [Canonical order].
void StepPlan::describe_param(size_t r) {
  Watch& watch = watches_[r];
  Owner& owner = owners_[r];
  const at::Tensor& param = THPVariable_Unpack(watch.object);
  const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  rows_[r].numel = 0;
  owner.device = impl->device();
  watch.problem = foreign(impl, device_);
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
  if (const char* problem = foreign(impl, device_)) return problem;
  if (impl->device() != owner.device) return "is on another device than its parameter";
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
[[gnu::always_inline]] inline bool StepPlan::refresh_param(size_t r) {
  Watch& watch = watches_[r];
  c10::TensorImpl* impl = THPVariable_Unpack(watch.object).unsafeGetTensorImpl();
  watch.param.impl = impl;
  watch.param.form.storage = impl->unsafe_storage().unsafeGetStorageImpl();
  // Always by its sizes: gradients and states are measured against it.
  if (watch.problem || !watch.param.form.same_kind(impl) || !watch.param.form.matches_shape(impl)) return false;
  rows_[r].param.data = rows_[r].numel ? data_of(impl) : nullptr;
  return true;
}

// Why the gradient cannot be used, or null. Sets the row's column, whose data is null without a gradient.
[[gnu::always_inline]] inline const char* StepPlan::refresh_grad(size_t r, bool write_back) {
  Watch& watch = watches_[r];
  TensorRow& row = rows_[r];
  Column& column = row.grad;
  column.data = nullptr;
  watch.autograd = watch.param.impl->autograd_meta();
  const at::Tensor& grad = watch.param.impl->grad();
  if (!grad.defined()) return nullptr;
  if (watch.problem) return watch.problem;
  c10::TensorImpl* impl = watch.grad.impl = grad.unsafeGetTensorImpl();
  if (!watch.grad.form.same_kind(impl)) {
    if (foreign(impl, device_) || impl->device() != owners_[r].device) {
      return "has a gradient that is not a plain dense tensor on its own device";
    }
    to_dtype(impl, column.dtype);
    watch.grad.form.take(impl);
  }
  watch.grad.form.storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (!row.param.layout && shape_of(impl) == watch.param.form.shape) {
    column.layout = nullptr;
  } else if (describe_column(owners_[r], grad, column, owners_[r].grad_layout, write_back)) {
    return "has a gradient whose shape or memory layout cannot be used";
  }
  column.data = row.numel ? data_of(impl) : &kEmpty;
  if (!column.data) return "has a gradient without memory (its storage was freed?)";
  return row.numel && !row.param.data ? "has no memory (its storage was freed?)" : nullptr;
}

// Takes the states of this step from the state dicts. Returns false when they are no longer as they were found.
bool StepPlan::refresh_states(PyObject* state, PyObject* counts) {
  const size_t count = state_entries_.size();
  const int state_count = rule_.state_count;
  const uint64_t state_version = version_of(state);
  const bool same_dicts = state_version && state_version == state_version_;
  const uint64_t counts_version = counts ? version_of(counts) : 0;
  const bool same_counts = counts_version && counts_version == counts_version_;
  for (size_t e = 0; e < std::min(kAhead, count); ++e) prefetch_state(e);
  for (size_t e = 0; e < count; ++e) {
    if (e + kAhead < count) prefetch_state(e + kAhead);
    StateEntry& entry = state_entries_[e];
    const StateKeys& keys = state_keys_[entry.keys];
    Watch& watch = watches_[entry.row];
    TensorRow& row = rows_[entry.row];
    Py_ssize_t position = entry.position;
    PyObject *key, *value;
    if (!same_dicts) {
      if (!PyDict_Next(state, &position, &key, &value) || key != watch.object || !PyDict_Check(value)) return false;
      entry.dict = value;
    }
    const uint64_t version = version_of(entry.dict);
    const bool same_objects = version && version == entry.version;
    // The tensor beside the i-th name, or null.
    auto tensor = [&](int i) -> c10::TensorImpl* {
      if (!same_objects) {
        position = keys.position[i];
        if (!PyDict_Next(entry.dict, &position, &key, &value) || key != keys.name[i].ptr()) return nullptr;
        if (!THPVariable_Check(value)) return nullptr;
        entry.objects[i] = value;
      }
      return THPVariable_Unpack(entry.objects[i]).unsafeGetTensorImpl();
    };
    c10::TensorImpl* impl;
    for (int c = 0; c < state_count; ++c) {
      if (!keys.name[1 + c]) continue;
      Watched& column = watch.state[c];
      impl = tensor(1 + c);
      if (!impl || !column.renew(impl)) return false;
      row.state[c].data = data_of(impl);
      if (!row.state[c].data && row.numel) return false;
    }
    if (!counts) {
      impl = tensor(0);
    } else {
      if (!(same_counts && same_objects) && !refresh_count(counts, entry, same_counts)) return false;
      impl = THPVariable_Unpack(entry.objects[0]).unsafeGetTensorImpl();
    }
    if (!impl || !watch.step.renew(impl)) return false;
    row.step = data_of(impl);
    if (!row.step) return false;
    entry.version = version;
  }
  state_version_ = state_version;
  counts_version_ = counts_version;
  return true;
}

// Takes the hidden count of this step. Returns false when it is no longer there, or counts another tensor's steps.
bool StepPlan::refresh_count(PyObject* counts, StateEntry& entry, bool same_counts) {
  if (!same_counts) {
    Py_ssize_t position = entry.count_position;
    PyObject *key, *pair;
    if (!PyDict_Next(counts, &position, &key, &pair) || key != watches_[entry.row].object) return false;
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) return false;
    entry.objects[0] = PyTuple_GET_ITEM(pair, 0);
    entry.counted = PyTuple_GET_ITEM(pair, 1);
    if (!THPVariable_Check(entry.objects[0]) || !PyWeakref_Check(entry.counted)) return false;
  }
  return referent(entry.counted) == entry.objects[1];
}

// Why the state cannot be used, or null. Sets the row's columns and the entry's keys.
const char* StepPlan::resolve_state(size_t r, PyObject* inner, const HiddenCounts* counts, StateEntry& entry) {
  Owner& owner = owners_[r];
  Watch& watch = watches_[r];
  TensorRow& row = rows_[r];
  const unsigned columns = groups_[watch.group].columns;
  StateKeys keys{};
  at::Tensor step, state[kMaxStates];
  Py_ssize_t position = 0;
  PyObject *name, *value, *first = nullptr;
  while (PyDict_Next(inner, &position, &name, &value)) {
    if (!PyUnicode_Check(name) || !THPVariable_Check(value)) continue;
    auto found = [&](const char* wanted, int i, at::Tensor& tensor) {
      if (PyUnicode_CompareWithASCIIString(name, wanted) != 0) return;
      tensor = THPVariable_Unpack(value);
      keys.name[i] = py::reinterpret_borrow<py::object>(name);
      keys.position[i] = position - 1;
      if (i == 1) first = value;
    };
    if (!counts) found("step", 0, step);
    for (int c = 0; c < rule_.state_count; ++c) {
      if (columns >> c & 1) found(rule_.states[c], 1 + c, state[c]);
    }
  }
  if (counts) {
    const auto found = counts->find(watch.object);
    if (found == counts->end()) return kNoState;
    const auto& [count_position, pair] = found->second;
    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2 || !THPVariable_Check(PyTuple_GET_ITEM(pair, 0)) ||
        !PyWeakref_Check(PyTuple_GET_ITEM(pair, 1))) {
      return kNoState;
    }
    entry.count_position = count_position;
    step = THPVariable_Unpack(PyTuple_GET_ITEM(pair, 0));
    // A count of another tensor says nothing about this one.
    if (!keys.name[1] || referent(PyTuple_GET_ITEM(pair, 1)) != first) return kNoState;
  }
  if (!step.defined()) return kNoState;
  const c10::TensorImpl* count = step.unsafeGetTensorImpl();
  if (unreachable(count, device_) || step.device() != owner.device || step.numel() != 1) return kNoState;
  watch.integer_count = counts_integers() && step.scalar_type() == at::kLong;
  if (!watch.integer_count) {
    if (!to_dtype(count, row.step_dtype)) return kNoState;  // its initialization converts it
    if (row.step_dtype != DType::kFloat32 && row.step_dtype != DType::kFloat64) return kNoState;
  }
  if (!data_of(step.unsafeGetTensorImpl())) return "has a step count without memory (its storage was freed?)";
  for (int c = 0; c < rule_.state_count; ++c) {
    if (!(columns >> c & 1)) continue;
    if (!state[c].defined()) return kNoState;
    if (describe_column(owner, state[c], row.state[c], owner.state_layout[c], true)) {
      return "has a state tensor whose shape, dtype, device or memory layout cannot be used";
    }
    if (row.numel && !data_of(state[c].unsafeGetTensorImpl())) {
      return "has a state tensor without memory (its storage was freed?)";
    }
  }
  watch.step.take(step.unsafeGetTensorImpl());
  for (int c = 0; c < rule_.state_count; ++c) {
    if (columns >> c & 1) watch.state[c].take(state[c].unsafeGetTensorImpl());
  }
  auto same = [](const StateKeys& a, const StateKeys& b) {
    for (int i = 0; i <= kMaxStates; ++i) {
      if (a.name[i].ptr() != b.name[i].ptr() || a.position[i] != b.position[i]) return false;
    }
    return true;
  };
  if (state_keys_.empty() || !same(state_keys_.back(), keys)) state_keys_.push_back(std::move(keys));
  entry.keys = static_cast<uint32_t>(state_keys_.size() - 1);
  return nullptr;
}

void StepPlan::resolve_states(PyObject* state, PyObject* counts) {
  std::unordered_map<PyObject*, uint32_t> row_of;
  HiddenCounts hidden;
  Py_ssize_t position = 0;
  PyObject *key, *inner;
  while (counts && PyDict_Next(counts, &position, &key, &inner)) hidden[key] = {position - 1, inner};
  state_problems_ = false;
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
  state_version_ = counts_version_ = 0;
  state_entries_.clear();
  state_keys_.clear();
  position = 0;
  while (PyDict_Next(state, &position, &key, &inner)) {
    const auto found = row_of.find(key);
    if (found == row_of.end() || !PyDict_Check(inner)) continue;
    const char*& problem = watches_[found->second].state_problem;
    if (!problem) continue;
    StateEntry entry{};
    entry.position = position - 1;
    entry.row = found->second;
    entry.dict = inner;
    entry.dict_entries = entries_of(inner);
    problem = resolve_state(entry.row, inner, counts ? &hidden : nullptr, entry);
    if (!problem) state_entries_.push_back(entry);
  }
  for (const Watch& watch : watches_) state_problems_ |= watch.state_problem != nullptr;
  states_known_ = true;
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

py::object StepPlan::refresh(PyObject* groups, PyObject* state, PyObject* counts, bool write_back) {
  any_active_ = any_double_ = false;
  try {
    if (!groups_unchanged(groups)) read_groups(groups);
  } catch (...) {
    groups_.clear();  // half read: start afresh at the next step
    throw;
  }
  if (hyper_changed_) number_groups();

  elements_ = 0;
  py::list problems;
  auto note = [&](size_t r, const char* problem) {
    problems.append(py::make_tuple(watches_[r].group, watches_[r].index, problem, problem == kNoState));
  };
  bool resized = false, moved = false;
  const size_t count = rows_.size();
  for (size_t r = 0; r < std::min(kAhead, count); ++r) prefetch_row(r);
  for (size_t r = 0; r < count; ++r) {
    if (r + kAhead < count) prefetch_row(r + kAhead);
    TensorRow& row = rows_[r];
    const void* data = row.param.data;
    if (!refresh_param(r)) {
      const int64_t numel = row.numel;
      const bool had_problem = watches_[r].problem;
      describe_param(r);
      refresh_param(r);
      moved = true;
      resized |= numel != row.numel;
      states_known_ &= had_problem && watches_[r].problem;
    }
    moved |= data != row.param.data;
    if (const char* problem = refresh_grad(r, write_back)) note(r, problem);
    if (!row.grad.data) continue;
    elements_ += row.numel;
    any_active_ = true;
    any_double_ |= row.param.dtype == DType::kFloat64;
  }
  if (resized) build_chunks();
  if (moved) find_overlaps();

  if (!states_known_ || !refresh_states(state, counts)) {
    resolve_states(state, counts);
    if (!refresh_states(state, counts)) throw std::runtime_error("the optimizer's state changed while it was read");
  }
  for (size_t r = 0; state_problems_ && r < count; ++r) {
    if (!rows_[r].grad.data || !watches_[r].state_problem) continue;
    note(r, watches_[r].state_problem);
    states_known_ = false;  // whoever is told will mend it
  }
  if (runner_) {
    row_devices_.resize(count);
    capturing_ = false;
    int last = -1;
    for (size_t r = 0; r < count; ++r) {
      row_devices_[r] = watches_[r].problem   ? device::kNowhere
                        : device_ == at::kCPU ? static_cast<int>(r) % emulated_devices_
                                              : owners_[r].device.index();
      if (row_devices_[r] == device::kNowhere || row_devices_[r] == last) continue;
      last = row_devices_[r];
      capturing_ |= runner_->capturing(last);
    }
    if (capturing_) {
      py::list refused;
      refuse_in_capture(refused);
      if (!refused.empty()) return refused;
    }
  }
  return problems.empty() ? py::object(py::none()) : py::object(problems);
}

// The steps taken by a row on a CPU.
double StepPlan::count_of(size_t r) const {
  const TensorRow& row = rows_[r];
  if (!row.step) return 0;
  if (watches_[r].integer_count) return static_cast<double>(*static_cast<int64_t*>(row.step));
  return row.step_dtype == DType::kFloat64 ? *static_cast<double*>(row.step) : *static_cast<float*>(row.step);
}

void StepPlan::derive_scalars() {
  struct Memo {
    double step = std::numeric_limits<double>::quiet_NaN();
    uint32_t scalars = 0, variant = 0;
  };
  std::vector<Memo> memo(group_table_.size());
  scalars_.clear();
  for (size_t r = 0; r < rows_.size(); ++r) {
    TensorRow& row = rows_[r];
    if (!row.grad.data) continue;
    const double step = count_of(r) + 1;
    Memo& known = memo[row.group];
    if (known.step != step) {
      known = {step, static_cast<uint32_t>(scalars_.size()), rule_.variant(group_table_[row.group]->value, step)};
      scalars_.emplace_back();
      rule_.derive(group_table_[row.group]->value, step, &scalars_.back());
    }
    row.scalars = known.scalars;
    row.variant = known.variant;
  }
}

void StepPlan::count_steps() {
  for (size_t r = 0; r < rows_.size(); ++r) {
    const TensorRow& row = rows_[r];
    if (!row.grad.data || !row.step) continue;
    if (watches_[r].integer_count) {
      *static_cast<int64_t*>(row.step) += 1;
    } else if (row.step_dtype == DType::kFloat64) {
      *static_cast<double*>(row.step) += 1;
    } else {
      *static_cast<float*>(row.step) += 1;
    }
  }
}

void StepPlan::bump_versions(bool write_back) {
  // Counting a version up is an atomic operation, which waits for its miss and everything before it: read them first.
  uint32_t versions = 0;
  for (size_t r = 0; r < rows_.size(); ++r) {
    c10::TensorImpl* impl = watches_[r].param.impl;
    if (rows_[r].grad.data && !impl->is_inference()) versions += impl->version_counter().current_version();
  }
  asm volatile("" : : "r"(versions));
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (!rows_[r].grad.data) continue;
    auto bump = [](c10::TensorImpl* impl) {
      if (!impl->is_inference()) impl->bump_version();
    };
    bump(watches_[r].param.impl);
    if (!write_back) continue;
    const at::Tensor& grad = watches_[r].param.impl->grad();
    if (grad.defined()) bump(grad.unsafeGetTensorImpl());
  }
}

// A replay runs nothing of this plan, so what a captured step leaves out is left out for good: better to say so.
void StepPlan::refuse_in_capture(py::list& problems) {
  auto note = [&](size_t r, const char* problem) {
    problems.append(py::make_tuple(watches_[r].group, watches_[r].index, problem, py::none()));
  };
  for (size_t r = 0; r < rows_.size(); ++r) {
    const at::Tensor& param = THPVariable_Unpack(watches_[r].object);
    if (rows_[r].grad.data) {
      if (watches_[r].state_problem == kNoState) {
        note(r, "has no state yet, which a captured step would make anew at each replay; step once before capturing");
      }
    } else if (param.requires_grad()) {
      note(r,
           "has no gradient while a CUDA graph is captured: replays would never update it. Give it one (zeros) before "
           "capturing, or requires_grad_(False)");
    }
  }
}

// All that a step works on, so that no other thread frees it.
std::vector<at::Tensor> StepPlan::hold_tensors() const {
  std::vector<at::Tensor> held;
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
  return held;
}

py::object StepPlan::step_on_devices(const StepSettings& s) {
  const device::Work work{rows_, row_devices_, group_table_, rule_.id, any_double_, overlaps_, capturing_};
  // A thread that waits for the device must let the others run: one of them may have to launch what it waits for.
  auto wait = [this](const std::function<void()>& read) {
    const std::vector<at::Tensor> held = hold_tensors();
    const py::gil_scoped_release unlocked;
    read();
  };
  // A launcher in Python may take seconds to compile, while other threads run.
  const std::vector<at::Tensor> held = launcher_ ? hold_tensors() : std::vector<at::Tensor>();
  device::Outcome outcome = runner_->step(work, s, wait);
  bump_versions(s.write_back);
  auto wrapped = [](at::Tensor& tensor) -> py::object {
    if (!tensor.defined()) return py::none();
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor)));
  };
  return py::make_tuple(wrapped(outcome.scalars), wrapped(outcome.found_inf));
}

py::object StepPlan::step(const py::object& groups, const py::dict& state, const py::object& counts,
                          const StepSettings& s) {
  // The passes run without the GIL, so another thread may get here, or drop what they work on. Reading a hyperparameter
  // may run Python, too.
  if (running_) throw std::runtime_error("a step of this optimizer is running in another thread");
  struct Running {
    bool& flag;
    explicit Running(bool& f) : flag(f) { flag = true; }
    ~Running() { flag = false; }
  } running(running_);
  py::object problems = refresh(groups.ptr(), state.ptr(), counts.is_none() ? nullptr : counts.ptr(), s.write_back);
  if (!problems.is_none()) return problems;
  if (runner_) return step_on_devices(s);

  const cpu::Work work{rows_, chunks_, elements_, overlaps_};
  const bool full = s.mode() == Mode::kFull;
  const double inverse_scale = 1.0 / s.scale.value;
  double norm = 0, coefficient = 1;
  bool skip = s.has_found_inf && s.found_inf.value != 0;
  if (any_active_) {
    derive_scalars();
    std::vector<at::Tensor> held;
    std::optional<py::gil_scoped_release> unlocked;
    if (elements_ >= kUnlockElements) {
      held = hold_tensors();
      unlocked.emplace();
    }
    if (s.mode() != Mode::kBare) {
      const cpu::Statistics found = cpu::statistics(work, s.norm, partials_);
      if (s.check) skip = found.nonfinite;
      norm = found.norm * inverse_scale;
    }
    if (full) coefficient = clip_coefficient(norm, s.max_norm.value);
    const bool refused = full && s.error_if_nonfinite && !skip && !std::isfinite(norm);
    if (!skip && !refused) {
      cpu::update(work, rule_.id, scalars_, {inverse_scale * coefficient, s.clip_value, s.write_back});
    }
    unlocked.reset();
    if (refused) refuse_norm(norm);
    if (!skip) {
      count_steps();
      bump_versions(s.write_back);
    }
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
