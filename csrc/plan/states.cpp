#include "states.h"

#include <algorithm>
#include <stdexcept>

#include "../tensors.h"
#include "dicts.h"
#include "local.h"
#include "prefetch.h"

namespace fusedopt::plan {
namespace {

// Of the entries of a state dict, to prefetch.
constexpr size_t kStateBytes = 88;

// Scales of codes have two bytes.
bool odd(const void* address) { return reinterpret_cast<uintptr_t>(address) % 2 != 0; }

// Note [The order of codes]
// Codes are in the order that the parameter's strides made when they were written, and another memory format of the
// parameter does not change them. So their tensor is marked with its order when it is first seen: the ranks, among
// those longer than 1, of the dimensions from the largest stride on. See fusedopt/rules/codes.py, which does the same.
bool in_order(PyObject* codes, const std::vector<int>& dimensions) {
  py::tuple order(dimensions.size());
  for (size_t i = 0; i < dimensions.size(); ++i) {
    order[i] = std::count_if(dimensions.begin(), dimensions.end(), [&](int d) { return d < dimensions[i]; });
  }
  const py::object tensor = py::reinterpret_borrow<py::object>(codes);
  constexpr const char* kMark = "_codes_order";
  if (!py::hasattr(tensor, kMark)) py::setattr(tensor, kMark, order);
  return order.equal(tensor.attr(kMark));
}

}  // namespace

bool States::Keys::operator==(const Keys& other) const {
  for (int i = 0; i <= kKeys; ++i) {
    if (name[i].ptr() != other.name[i].ptr() || position[i] != other.position[i]) return false;
  }
  return true;
}

// See Note [Prefetching].
[[gnu::always_inline]] inline void States::prefetch_entry(const Entry& entry, const Rows& rows) const {
  const HotRow& row = rows.hot[entry.row];
  prefetch(entry.dict, sizeof(PyDictObject));
  if (!entry.version) prefetch(entry.dict_entries, kStateBytes);
  for (int i = 0; i <= rule_.state_count; ++i) __builtin_prefetch(entry.objects[i]);
  if (!entry.version) __builtin_prefetch(entry.counted);
  prefetch_tensor(row.step.impl, false);
  prefetch_storage(row.step.fingerprint.storage);
  __builtin_prefetch(rows.table[entry.row].step);
  auto prefetch_column = [](const KnownTensor& column) __attribute__((always_inline)) {
    if (!column.impl) return;
    prefetch_tensor(column.impl, !column.fingerprint.contiguous);
    prefetch_storage(column.fingerprint.storage);
  };
  for (const KnownTensor& column : row.state) prefetch_column(column);
  if (rows.carried.empty()) return;
  prefetch_column(rows.carried[entry.row].master);
  prefetch_column(rows.carried[entry.row].average);
}

// Takes the states of this step from the state dicts. Returns false when they are no longer as they were found.
bool States::follow(PyObject* state, PyObject* counts, Rows& rows) {
  const size_t count = entries_.size();
  const int state_count = rule_.state_count;
  const uint64_t state_version = version_of(state);
  const bool same_dicts = state_version && state_version == state_version_;
  const uint64_t counts_version = counts ? version_of(counts) : 0;
  const bool same_counts = counts_version && counts_version == counts_version_;
  for (size_t e = 0; e < std::min(kAhead, count); ++e) prefetch_entry(entries_[e], rows);
  for (size_t e = 0; e < count; ++e) {
    if (e + kAhead < count) prefetch_entry(entries_[e + kAhead], rows);
    Entry& entry = entries_[e];
    const Keys& keys = keys_[entry.keys];
    HotRow& row = rows.hot[entry.row];
    TensorRow& columns = rows.table[entry.row];
    if (!same_dicts) {
      PyObject* const dict = value_at(state, entry.position, row.object);
      if (!dict || !PyDict_Check(dict)) return false;
      entry.dict = dict;
    }
    const uint64_t version = version_of(entry.dict);
    const bool same_objects = version && version == entry.version;
    // The tensor beside the i-th name, or null.
    auto tensor = [&](int i) -> c10::TensorImpl* {
      if (!same_objects) {
        PyObject* const value = value_at(entry.dict, keys.position[i], keys.name[i].ptr());
        if (!value || !THPVariable_Check(value)) return nullptr;
        entry.objects[i] = value;
      }
      return local_of(entry.objects[i]).unsafeGetTensorImpl();
    };
    c10::TensorImpl* impl;
    for (int c = 0; c < state_count; ++c) {
      if (!keys.name[1 + c]) continue;
      impl = tensor(1 + c);
      if (!impl || !row.state[c].renew(impl)) return false;
      columns.state[c].data = data_of(impl);
      if (!columns.state[c].data && columns.numel) return false;
      if (is_coded(columns.state[c].dtype) && odd(columns.state[c].data)) [[unlikely]]
        return false;
    }
    if (!rows.carried.empty()) [[unlikely]] {
      for (int c = kMasterKey; c < kKeys; ++c) {
        if (keys.name[1 + c] && !tensor(1 + c)) return false;
      }
      if (!follow_carried(entry, rows.carried[entry.row])) return false;
    }
    if (!counts) {
      impl = tensor(0);
    } else {
      if (!(same_counts && same_objects) && !follow_count(counts, entry, row.object, same_counts)) return false;
      impl = THPVariable_Unpack(entry.objects[0]).unsafeGetTensorImpl();
    }
    if (!impl || !row.step.renew(impl)) return false;
    columns.step = data_of(impl);
    if (!columns.step) return false;
    entry.version = version;
  }
  state_version_ = state_version;
  counts_version_ = counts_version;
  return true;
}

// Takes what the row carries, whose objects the entry has.
bool States::follow_carried(const Entry& entry, CarriedRow& row) const {
  auto follow = [&](int key, KnownTensor& known, Column& column) {
    if (!keys_[entry.keys].name[1 + key]) return true;
    c10::TensorImpl* const impl = local_of(entry.objects[1 + key]).unsafeGetTensorImpl();
    if (!known.renew(impl)) return false;
    column.data = data_of(impl);
    return column.data || !impl->numel();
  };
  return follow(kMasterKey, row.master, row.carried.master) && follow(kAverageKey, row.average, row.carried.average);
}

// Takes the hidden count of this step. Returns false when it is no longer there, or counts another tensor's steps.
bool States::follow_count(PyObject* counts, Entry& entry, PyObject* param, bool same_counts) const {
  if (!same_counts) {
    PyObject* const pair = value_at(counts, entry.count_position, param);
    if (!pair || !is_hidden_count(pair)) return false;
    entry.objects[0] = PyTuple_GET_ITEM(pair, 0);
    entry.counted = PyTuple_GET_ITEM(pair, 1);
  }
  return referent(entry.counted) == entry.objects[1 + keys_[entry.keys].first];
}

// The tensors of a state dict that the rule needs, by their names.
States::Found States::look_into(PyObject* dict, unsigned columns, bool has_step) const {
  Found found;
  Py_ssize_t position = 0;
  PyObject *name, *value;
  while (PyDict_Next(dict, &position, &name, &value)) {
    if (!PyUnicode_Check(name) || !THPVariable_Check(value)) continue;
    auto take = [&](const char* wanted, int i, at::Tensor& tensor) {
      if (PyUnicode_CompareWithASCIIString(name, wanted) != 0) return;
      tensor = local_of(value);
      found.objects[i] = value;
      found.keys.name[i] = py::reinterpret_borrow<py::object>(name);
      found.keys.position[i] = position - 1;
    };
    if (has_step) take("step", 0, found.step);
    for (int c = 0; c < kKeys; ++c) {
      if (columns >> c & 1) take(precision_.key(c).c_str(), 1 + c, found.columns[c]);
    }
  }
  while (found.keys.first < kAverageKey && !found.objects[1 + found.keys.first]) ++found.keys.first;
  return found;
}

const char* States::find_hidden_count(const HiddenCounts& counts, PyObject* param, Entry& entry, Found& found) const {
  const auto place = counts.find(param);
  if (place == counts.end()) return kNoState;
  const auto& [position, pair] = place->second;
  if (!is_hidden_count(pair)) return kNoState;
  entry.count_position = position;
  found.step = THPVariable_Unpack(PyTuple_GET_ITEM(pair, 0));
  // A count of another tensor says nothing about this one.
  PyObject* const first = found.objects[1 + found.keys.first];
  return first && referent(PyTuple_GET_ITEM(pair, 1)) == first ? nullptr : kNoState;
}

// Why the step count cannot be used, or null. Sets the row's dtype of it.
const char* States::take_count(const at::Tensor& step, size_t r, Rows& rows) const {
  if (!step.defined()) return kNoState;
  TensorRow& row = rows.table[r];
  c10::TensorImpl* impl = step.unsafeGetTensorImpl();
  if (unreachable(impl, target_.type) || step.device() != rows.cold[r].order.device() || step.numel() != 1) {
    return kNoState;
  }
  const bool integer = !target_.device_kernels && step.scalar_type() == at::kLong;
  rows.hot[r].integer_count = integer;
  if (!integer) {
    if (!to_dtype(impl, row.step_dtype)) return kNoState;  // its initialization converts it
    if (row.step_dtype != DType::kFloat32 && row.step_dtype != DType::kFloat64) return kNoState;
  }
  return data_of(impl) ? nullptr : "has a step count without memory (its storage was freed?)";
}

// Why a column cannot be used, or null. Sets that of the row.
const char* States::take_column(const Found& found, int c, size_t r, Rows& rows) const {
  constexpr const char* kUnusable = "has a state tensor whose shape, dtype, device or memory layout cannot be used";
  const at::Tensor& tensor = found.columns[c];
  if (!tensor.defined()) return kNoState;
  TensorRow& row = rows.table[r];
  ColdRow& cold = rows.cold[r];
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  if (row.numel && (unreachable(impl, target_.type) || !data_of(impl))) {
    return "has a state tensor without memory (its storage was freed?)";
  }
  const bool rules_own = c < rule_.state_count;
  if (rules_own && precision_.form(c) == Form::kCoded) {
    if (unreachable(impl, target_.type) || tensor.scalar_type() != at::kByte || !impl->is_contiguous() ||
        tensor.device() != cold.order.device() || tensor.dim() != 1 || tensor.numel() != coded_bytes(row.numel) ||
        odd(data_of(impl))) {
      return "has codes of a state that are not those of its elements";
    }
    if (!in_order(found.objects[1 + c], cold.order.dimensions())) {
      return "has codes of a state in the order that its strides made before its memory format was changed; change it "
             "before the first step, or load the optimizer's state dict again";
    }
    row.state[c] = {nullptr, nullptr, rule_.squares >> c & 1 ? DType::kUnsigned8 : DType::kSigned8};
    return nullptr;
  }
  PyObject* const object = found.objects[1 + c];
  const bool dealt_out = rows.hot[r].dtensor || !THPVariable_Unpack(object).is_same(tensor);
  if (dealt_out && !dealt_out_alike(rows.hot[r].object, object))
    return "has a state tensor that is dealt out in another way";
  CarriedRow* const carried = rules_own ? nullptr : &rows.carried[r];
  Column& column = rules_own ? row.state[c] : c == kMasterKey ? carried->carried.master : carried->carried.average;
  OwnedLayout& layout = rules_own         ? cold.state_layout[c]
                        : c == kMasterKey ? carried->master_layout
                                          : carried->average_layout;
  // The rest of a parameter's bits are no numbers, and its dtype is the master's kind.
  const auto type = tensor.scalar_type();
  const bool pieces = c == kMasterKey && (type == at::kShort || type == at::kByte);
  if (pieces) {
    if (row.param.dtype != DType::kBFloat16) return kUnusable;
    if (cold.order.describe_pieces(tensor, column, layout)) return kUnusable;
    column.dtype = type == at::kShort ? DType::kLow16 : DType::kLow8;
    return nullptr;
  }
  if (cold.order.describe(tensor, column, layout, true)) return kUnusable;
  if (c == kMasterKey && column.dtype != DType::kFloat32) return kUnusable;
  if (c == kAverageKey && column.dtype != DType::kFloat32 && column.dtype != DType::kFloat64) return kUnusable;
  if (rules_own && precision_.form(c) == Form::kRoot) {
    if (column.dtype != DType::kFloat16) return kUnusable;
    column.dtype = DType::kRoot16;
  }
  return nullptr;
}

// Why the columns cannot be used, or null. Sets those of the row.
const char* States::take_columns(const Found& found, unsigned columns, size_t r, Rows& rows) const {
  for (int c = 0; c < kKeys; ++c) {
    if (!(columns >> c & 1)) continue;
    if (const char* problem = take_column(found, c, r, rows)) return problem;
  }
  return nullptr;
}

// Why the state of the entry's row cannot be used, or null. Sets the row's columns and the entry's keys.
const char* States::find_row(Entry& entry, unsigned columns, const HiddenCounts* counts, Rows& rows) {
  HotRow& row = rows.hot[entry.row];
  Found found = look_into(entry.dict, columns, !counts);
  if (counts) {
    if (const char* problem = find_hidden_count(*counts, row.object, entry, found)) return problem;
  }
  if (const char* problem = take_count(found.step, entry.row, rows)) return problem;
  if (const char* problem = take_columns(found, columns, entry.row, rows)) return problem;
  row.step.take(found.step.unsafeGetTensorImpl());
  for (int c = 0; c < kKeys; ++c) {
    if (!(columns >> c & 1)) continue;
    KnownTensor& known = c < kMaxStates    ? row.state[c]
                         : c == kMasterKey ? rows.carried[entry.row].master
                                           : rows.carried[entry.row].average;
    known.take(found.columns[c].unsafeGetTensorImpl());
  }
  if (keys_.empty() || !(keys_.back() == found.keys)) keys_.push_back(std::move(found.keys));
  entry.keys = static_cast<uint32_t>(keys_.size() - 1);
  return nullptr;
}

// What the state dict of a row has to have, as bits.
unsigned States::needed(const Groups& groups, const Rows& rows, size_t r) const {
  return groups.columns(rows.hot[r].group) | precision_.carried(rows.table[r].param.dtype);
}

// Looks up the states of all rows, by name.
void States::find(PyObject* state, PyObject* counts, const Groups& groups, Rows& rows) {
  std::unordered_map<PyObject*, uint32_t> row_of;
  HiddenCounts hidden;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (counts && PyDict_Next(counts, &position, &key, &value)) hidden[key] = {position - 1, value};
  for (size_t r = 0; r < rows.size(); ++r) {
    HotRow& row = rows.hot[r];
    row_of.emplace(row.object, static_cast<uint32_t>(r));
    row.step = {};
    rows.table[r].step = nullptr;
    for (int c = 0; c < kMaxStates; ++c) {
      row.state[c] = {};
      rows.table[r].state[c] = {};
    }
    if (!rows.carried.empty()) {
      CarriedRow& carried = rows.carried[r];
      carried.master = carried.average = {};
      carried.carried.master = carried.carried.average = {};
    }
    row.state_problem = !row.problem && needed(groups, rows, r) ? kNoState : nullptr;
  }
  state_version_ = counts_version_ = 0;
  entries_.clear();
  keys_.clear();
  position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    const auto found = row_of.find(key);
    if (found == row_of.end() || !PyDict_Check(value)) continue;
    HotRow& row = rows.hot[found->second];
    if (!row.state_problem) continue;
    Entry entry{};
    entry.position = position - 1;
    entry.row = found->second;
    entry.dict = value;
    entry.dict_entries = entries_of(value);
    row.state_problem = find_row(entry, needed(groups, rows, entry.row), counts ? &hidden : nullptr, rows);
    if (!row.state_problem) entries_.push_back(entry);
  }
  incomplete_ = std::any_of(rows.hot.begin(), rows.hot.end(), [](const HotRow& row) { return row.state_problem; });
  known_ = true;
}

void States::refresh(PyObject* state, PyObject* counts, const Groups& groups, Rows& rows, Problems& problems) {
  if (!known_ || !follow(state, counts, rows)) {
    find(state, counts, groups, rows);
    if (!follow(state, counts, rows)) throw std::runtime_error("the optimizer's state changed while it was read");
  }
  if (!incomplete_) return;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!rows.table[r].grad.data || !rows.hot[r].state_problem) continue;
    problems.push_back({r, rows.hot[r].state_problem});
    known_ = false;  // whoever is told will mend it
  }
}

}  // namespace fusedopt::plan
