#include "groups.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "dicts.h"
#include "numbers.h"
#include "prefetch.h"

namespace fusedopt::plan {
namespace {

std::string name_of(Py_ssize_t group) { return "param_groups[" + std::to_string(group) + "]"; }

// Numbers of Python's own never change in place; tensors, numpy arrays and lists may.
bool fixed(PyObject* object) { return PyFloat_CheckExact(object) || PyLong_CheckExact(object); }

}  // namespace

// A hyperparameter; one that is a tensor on the plan's device is left there.
bool Groups::read_number(PyObject* value, HyperValues& hyper, int slot) {
  hyper.live[slot] = nullptr;
  if (THPVariable_Check(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (target_.reads(tensor)) {
      if (tensor.numel() != 1) return false;
      // NaN is unequal to everything, so that no state is taken for one that is not needed.
      hyper.value[slot] = std::numeric_limits<double>::quiet_NaN();
      hyper.live[slot] = tensor.unsafeGetTensorImpl();
      return true;
    }
  }
  return to_double(value, hyper.value[slot]);
}

void Groups::read_value(Group& group, Py_ssize_t g, Entry& entry) {
  const HyperKey& key = rule_.keys[entry.hyper_key];
  PyObject* value = entry.value.ptr();
  bool ok = true;
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
    throw py::type_error(name_of(g) + "['" + key.key + "'] is " + py::repr(entry.value).cast<std::string>() +
                         "; expected " +
                         (key.arity == HyperKey::kFlag ? "True or False"
                          : key.arity == 1             ? "a number or a 1-element tensor"
                                                       : "two numbers or 1-element tensors"));
  }
  edited_ = true;
}

void Groups::forget() {
  groups_.clear();
  dicts_.reset(0);
}

// See Note [Prefetching].
[[gnu::always_inline]] inline void Groups::prefetch_group(size_t g, PyObject* dict) const {
  const Group& group = groups_[g];
  KnownDicts::prefetch(dict);
  prefetch_object(group.params);
  __builtin_prefetch(&reinterpret_cast<const PyListObject*>(group.params)->ob_item);
  __builtin_prefetch(group.items);
}

// Reads what is new in a group's dict, or only what may have changed in place. Returns false when the dict no longer
// has its keys where they were.
bool Groups::reread(Group& group, Py_ssize_t g, PyObject* dict, bool changed) {
  if (!changed) {
    for (Entry& entry : group.entries) {
      if (entry.live) read_value(group, g, entry);
    }
    return true;
  }
  group.live = false;
  for (Entry& entry : group.entries) {
    PyObject* const value = value_at(dict, entry.position, entry.key.ptr());
    if (!value) return false;
    if (entry.hyper_key == kParams) {
      group.params = value;
      continue;
    }
    const bool replaced = entry.value.ptr() != value;
    if (replaced) entry.value = py::reinterpret_borrow<py::object>(value);
    if (replaced || entry.live) read_value(group, g, entry);
    group.live |= entry.live;
  }
  return true;
}

bool Groups::unchanged(PyObject* param_groups, const Rows& rows) {
  const Items list(param_groups, "param_groups");
  const size_t count = groups_.size();
  if (list.size() != static_cast<Py_ssize_t>(count)) return false;
  size_t row = 0;
  for (size_t g = 0; g < count; ++g) {
    if (g + kAhead < count) prefetch_group(g + kAhead, list[static_cast<Py_ssize_t>(g + kAhead)]);
    Group& group = groups_[g];
    PyObject* const dict = list[static_cast<Py_ssize_t>(g)];
    const bool changed = !dicts_.same(g, dict);
    if (changed || group.live) {
      // Reading hyperparameters may run Python.
      const py::object alive = py::reinterpret_borrow<py::object>(dict);
      if (!PyDict_Check(dict)) return false;
      if (changed) dicts_.know(g, dict);
      if (!reread(group, static_cast<Py_ssize_t>(g), dict, changed)) return false;
      if (list.size() != static_cast<Py_ssize_t>(count) || list[static_cast<Py_ssize_t>(g)] != dict) return false;
    }
    const Items params(group.params, "params");
    if (static_cast<size_t>(params.size()) != group.size) return false;
    if (!std::equal(params.begin(), params.begin() + group.size, rows.objects.data() + row)) return false;
    row += group.size;
    group.items = params.begin();
  }
  return row == rows.size();
}

// Takes what a group's dict has for the rule, and where.
void Groups::read_entries(Group& group, Py_ssize_t g, PyObject* dict) {
  bool found[kMaxHyper] = {};
  Py_ssize_t next = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &next, &key, &value)) {
    if (!PyUnicode_Check(key)) continue;
    Entry entry{py::reinterpret_borrow<py::object>(key), py::object(), next - 1, kParams, false};
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
      group.live |= entry.live;
      group.entries.push_back(std::move(entry));
      break;
    }
  }
  for (int k = 0; k < rule_.key_count; ++k) {
    if (!found[k]) throw py::key_error(name_of(g) + " has no '" + rule_.keys[k].key + "'");
  }
}

void Groups::read(PyObject* param_groups, Rows& rows) {
  const Items list(param_groups, "param_groups");
  const Py_ssize_t count = list.size();
  groups_.clear();
  dicts_.reset(static_cast<size_t>(count));
  rows.clear();
  edited_ = true;
  std::unordered_set<PyObject*> known;
  for (Py_ssize_t g = 0; g < count; ++g) {
    if (list.size() != count) throw std::runtime_error("the parameter groups changed while they were read");
    const py::object dict = py::reinterpret_borrow<py::object>(list[g]);
    if (!PyDict_Check(dict.ptr())) throw py::type_error(name_of(g) + " is not a dict");
    const auto number = static_cast<size_t>(g);
    Group group{};
    dicts_.know(number, dict.ptr());
    read_entries(group, g, dict.ptr());
    PyObject* params_value = PyDict_GetItemString(dict.ptr(), "params");
    if (!params_value) throw py::key_error(name_of(g) + " has no 'params'");
    const Items params(params_value, (name_of(g) + "['params']").c_str());
    group.params = params_value;
    group.size = static_cast<size_t>(params.size());
    for (Py_ssize_t i = 0; i < params.size(); ++i) {
      const auto index = static_cast<size_t>(i);
      if (!THPVariable_Check(params[i])) throw py::type_error(place_of(number, index) + " is not a tensor");
      // Two threads would write one parameter.
      if (!known.insert(params[i]).second) {
        throw py::value_error(place_of(number, index) + " is in the optimizer already");
      }
      rows.add(params[i], static_cast<uint32_t>(g), static_cast<uint32_t>(i));
    }
    groups_.push_back(std::move(group));
  }
  rows.build_chunks();
}

bool Groups::number(Rows& rows) {
  std::unordered_map<std::string_view, uint32_t> numbers;
  table_.clear();
  bool same_columns = true;
  size_t row = 0;
  for (Group& group : groups_) {
    const std::string_view bytes(reinterpret_cast<const char*>(&group.hyper), sizeof(group.hyper));
    auto [found, fresh] = numbers.emplace(bytes, static_cast<uint32_t>(table_.size()));
    if (fresh) table_.push_back(&group.hyper);
    const unsigned before = std::exchange(group.columns, rule_.columns(rule_.variant(group.hyper.value, 0)));
    same_columns &= group.columns == before;
    const size_t end = row + group.size;
    if (group.table_row != found->second) {
      group.table_row = found->second;
      for (size_t r = row; r < end; ++r) rows.table[r].group = group.table_row;
    }
    row = end;
  }
  edited_ = false;
  return same_columns;
}

}  // namespace fusedopt::plan
