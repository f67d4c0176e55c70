#include "groups.h"

#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

#include "dicts.h"
#include "numbers.h"
#include "prefetch.h"

namespace fusedopt::plan {
namespace {

// Of the entries of a group's dict, to prefetch.
constexpr size_t kGroupBytes = 256;

std::string name_of(Py_ssize_t group) { return "param_groups[" + std::to_string(group) + "]"; }

std::string place(Py_ssize_t group, Py_ssize_t index) {
  return name_of(group) + "['params'][" + std::to_string(index) + "]";
}

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

// See Note [Prefetching].
[[gnu::always_inline]] inline void Groups::prefetch_group(size_t g, PyObject* dict) const {
  const Group& group = groups_[g];
  prefetch(dict, sizeof(PyDictObject));
  if (!group.version) prefetch(group.dict_entries, kGroupBytes);
  prefetch(group.params, sizeof(PyListObject));
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
  const std::vector<HotRow>& hot = rows.hot;
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
    if (changed || group.live) {
      alive = py::reinterpret_borrow<py::object>(dict);
      if (!reread(group, static_cast<Py_ssize_t>(g), dict, changed)) return false;
      group.version = version;
      group.dict_entries = entries_of(dict);
    }
    const Items params(group.params, "params");
    const auto size = static_cast<size_t>(params.size());
    if (size > hot.size() - row || (row + size < hot.size() && hot[row + size].group == g)) return false;
    for (size_t i = 0; i < size; ++i, ++row) {
      PyObject* const param = params[static_cast<Py_ssize_t>(i)];
      if (hot[row].object != param || hot[row].group != g || !THPVariable_Check(param)) return false;
    }
    group.items = size ? params.begin() : nullptr;
  }
  return row == hot.size();
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
      group.entries.push_back(std::move(entry));
      break;
    }
  }
  for (int k = 0; k < rule_.key_count; ++k) {
    if (!found[k]) throw py::key_error(name_of(g) + " has no '" + rule_.keys[k].key + "'");
  }
}

void Groups::read(PyObject* param_groups, Rows& rows) {
  groups_.clear();
  rows.clear();
  edited_ = true;
  std::unordered_set<PyObject*> known;
  const Items list(param_groups, "param_groups");
  for (Py_ssize_t g = 0; g < list.size(); ++g) {
    if (!PyDict_Check(list[g])) throw py::type_error(name_of(g) + " is not a dict");
    Group group{};
    read_entries(group, g, list[g]);
    PyObject* params_value = PyDict_GetItemString(list[g], "params");
    if (!params_value) throw py::key_error(name_of(g) + " has no 'params'");
    const Items params(params_value, (name_of(g) + "['params']").c_str());
    for (Py_ssize_t i = 0; i < params.size(); ++i) {
      if (!THPVariable_Check(params[i])) throw py::type_error(place(g, i) + " is not a tensor");
      // Two threads would write one parameter.
      if (!known.insert(params[i]).second) throw py::value_error(place(g, i) + " is in the optimizer already");
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
  for (Group& group : groups_) {
    const std::string_view bytes(reinterpret_cast<const char*>(&group.hyper), sizeof(group.hyper));
    auto [found, fresh] = numbers.emplace(bytes, static_cast<uint32_t>(table_.size()));
    if (fresh) table_.push_back(&group.hyper);
    group.table_row = found->second;
    const unsigned before = std::exchange(group.columns, rule_.columns(rule_.variant(group.hyper.value, 0)));
    same_columns &= group.columns == before;
  }
  for (size_t r = 0; r < rows.size(); ++r) rows.table[r].group = groups_[rows.hot[r].group].table_row;
  edited_ = false;
  return same_columns;
}

}  // namespace fusedopt::plan
