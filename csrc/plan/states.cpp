#include "states.h"

#include <algorithm>
#include <stdexcept>

#include "../tensors.h"
#include "dicts.h"
#include "local.h"
#include "prefetch.h"

namespace fusedopt::plan {
namespace {

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

// The state of a row with an index as a state dict's: the step count, the rule's columns, and what rows carry.
KnownState& state_at(Rows& rows, size_t r, int i) {
  if (i == 0) return rows.states[r].step;
  const int c = i - 1;
  if (c < kMaxStates) return rows.states[r].column[c];
  return c == kMasterKey ? rows.carried[r].master : rows.carried[r].average;
}

// See Note [Prefetching].
[[gnu::always_inline]] inline void States::prefetch_states(size_t r, const Rows& rows) const {
  if (state_dicts_[r]) KnownDicts::prefetch(state_dicts_[r]);
  auto prefetch_state = [](const KnownState& state) __attribute__((always_inline)) {
    if (!state.object) return;
    prefetch_object(state.object);
    prefetch_tensor(state.tensor.impl, false);
    prefetch_storage(state.tensor.storage);
  };
  prefetch_state(rows.states[r].step);
  if (!target_.device_kernels) __builtin_prefetch(rows.table[r].step);
  for (const KnownState& state : rows.states[r].column) prefetch_state(state);
  if (rows.carried.empty()) return;
  prefetch_state(rows.carried[r].master);
  prefetch_state(rows.carried[r].average);
}

// Takes the states of this step from the tensors that the row has. Returns false when one is no longer as it was found.
template <class LocalOf>
[[gnu::always_inline]] inline bool States::take_data(size_t r, Rows& rows, const LocalOf& local_of) const {
  StateRow& states = rows.states[r];
  TensorRow& row = rows.table[r];
  // Where the tensor of this step has its data; `same` is false when it is not as it was found.
  bool same = true;
  auto data = [&](KnownState& state) __attribute__((always_inline)) -> void* {
    c10::TensorImpl* const impl = local_of(state.object).unsafeGetTensorImpl();
    same = state.tensor.renew(impl, rows.prints);
    return same ? data_of(impl) : nullptr;
  };
  for (int c = 0; c < kMaxStates; ++c) {
    if (!states.column[c].object) continue;
    void* const now = data(states.column[c]);
    if (!same || (!now && row.numel)) return false;
    if (is_coded(row.state[c].dtype) && odd(now)) [[unlikely]]
      return false;
    replace(row.state[c].data, now);
  }
  if (!rows.carried.empty()) [[unlikely]] {
    CarriedRow& carried = rows.carried[r];
    auto follow = [&](KnownState& state, Column& column) {
      if (!state.object) return true;
      void* const now = data(state);
      if (!same || (!now && row.numel)) return false;
      replace(column.data, now);
      return true;
    };
    if (!follow(carried.master, carried.carried.master) || !follow(carried.average, carried.carried.average)) {
      return false;
    }
  }
  if (!states.step.object) return false;
  void* const step = data(states.step);
  if (!step) return false;
  replace(row.step, step);
  if (!target_.device_kernels) {
    with_count(row, rows.hot[r].integer_count, [&](auto count) { rows.counts[r] = static_cast<double>(count); });
  }
  return true;
}

bool States::can_look(PyObject* state, PyObject* counts, const Rows& rows) const {
  if (!known_ || rows.dealt_out()) return false;
  return dicts_.same(kState, state) && (!counts || dicts_.same(kCounts, counts));
}

bool States::look(size_t begin, size_t end, Rows& rows) const {
  for (size_t r = begin; r < std::min(begin + kAhead, end); ++r) prefetch_states(r, rows);
  for (size_t r = begin; r < end; ++r) {
    if (r + kAhead < end) prefetch_states(r + kAhead, rows);
    if (!state_dicts_[r]) continue;
    if (!dicts_.same(kFirst + r, state_dicts_[r])) return false;
    const bool same = take_data(r, rows, [](PyObject* object) __attribute__((always_inline)) -> const at::Tensor& {
      return THPVariable_Unpack(object);
    });
    if (!same) return false;
  }
  return true;
}

// Takes the objects of a row from its state dict, by position, where that has changed. Returns false when they are no
// longer as they were found.
bool States::follow_dict(size_t r, Rows& rows) {
  PyObject* const dict = state_dicts_[r];
  if (dicts_.same(kFirst + r, dict)) return true;
  dicts_.know(kFirst + r, dict);
  const Keys& keys = keys_[entries_[r].keys];
  for (int i = 0; i <= kKeys; ++i) {
    if (!keys.name[i]) continue;
    PyObject* const value = value_at(dict, keys.position[i], keys.name[i].ptr());
    if (!value || !THPVariable_Check(value)) return false;
    state_at(rows, r, i).object = value;
  }
  return true;
}

// Takes the hidden count of this step. Returns false when it is no longer there, or counts another tensor's steps.
bool States::follow_count(PyObject* counts, size_t r, Rows& rows) {
  Entry& entry = entries_[r];
  PyObject* const pair = value_at(counts, entry.count_position, rows.objects[r]);
  if (!pair || !is_hidden_count(pair)) return false;
  rows.states[r].step.object = PyTuple_GET_ITEM(pair, 0);
  entry.counted = PyTuple_GET_ITEM(pair, 1);
  return true;
}

// Takes the states of this step from the state dicts. Returns false when they are no longer as they were found.
bool States::follow(PyObject* state, PyObject* counts, Rows& rows) {
  const bool same_state = dicts_.same(kState, state), same_counts = !counts || dicts_.same(kCounts, counts);
  dicts_.know(kState, state);
  if (counts) dicts_.know(kCounts, counts);
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!state_dicts_[r]) continue;
    if (!same_state) {
      PyObject* const dict = value_at(state, entries_[r].position, rows.objects[r]);
      if (!dict || !PyDict_Check(dict)) return false;
      state_dicts_[r] = dict;
    }
    if (!follow_dict(r, rows)) return false;
    if (!same_counts && !follow_count(counts, r, rows)) return false;
    if (counts) {
      const PyObject* const first = state_at(rows, r, 1 + keys_[entries_[r].keys].first).object;
      if (referent(entries_[r].counted) != first) return false;
    }
    if (!take_data(r, rows, [](PyObject* object) -> const at::Tensor& { return local_of(object); })) return false;
  }
  return true;
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
  entry.counted = PyTuple_GET_ITEM(pair, 1);
  found.objects[0] = PyTuple_GET_ITEM(pair, 0);
  found.step = THPVariable_Unpack(found.objects[0]);
  // A count of another tensor says nothing about this one.
  PyObject* const first = found.objects[1 + found.keys.first];
  return first && referent(entry.counted) == first ? nullptr : kNoState;
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
  if (dealt_out && !dealt_out_alike(rows.objects[r], object))
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

// Why the state of a row cannot be used, or null. Sets the row's columns and where they were found.
const char* States::find_row(size_t r, unsigned columns, const HiddenCounts* counts, Rows& rows) {
  Entry& entry = entries_[r];
  Found found = look_into(state_dicts_[r], columns, !counts);
  if (counts) {
    if (const char* problem = find_hidden_count(*counts, rows.objects[r], entry, found)) return problem;
  }
  if (const char* problem = take_count(found.step, r, rows)) return problem;
  if (const char* problem = take_columns(found, columns, r, rows)) return problem;
  for (int i = 0; i <= kKeys; ++i) {
    const at::Tensor& tensor = i == 0 ? found.step : found.columns[i - 1];
    if (!tensor.defined()) continue;
    KnownState& state = state_at(rows, r, i);
    state.object = found.objects[i];
    state.tensor.take(tensor.unsafeGetTensorImpl(), rows.prints);
  }
  if (keys_.empty() || !(keys_.back() == found.keys)) keys_.push_back(std::move(found.keys));
  entry.keys = static_cast<uint32_t>(keys_.size() - 1);
  return nullptr;
}

// What the state dict of a row has to have, as bits.
unsigned States::needed(const Groups& groups, const Rows& rows, size_t r) const {
  return groups.columns(rows.cold[r].group) | precision_.carried(rows.table[r].param.dtype);
}

// Looks up the states of all rows, by name.
void States::find(PyObject* state, PyObject* counts, const Groups& groups, Rows& rows) {
  std::unordered_map<PyObject*, size_t> row_of;
  HiddenCounts hidden;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  dicts_.reset(kFirst + rows.size());
  dicts_.know(kState, state);
  if (counts) dicts_.know(kCounts, counts);
  while (counts && PyDict_Next(counts, &position, &key, &value)) hidden[key] = {position - 1, value};
  for (size_t r = 0; r < rows.size(); ++r) {
    row_of.emplace(rows.objects[r], r);
    rows.states[r] = {};
    rows.table[r].step = nullptr;
    for (int c = 0; c < kMaxStates; ++c) rows.table[r].state[c] = {};
    if (!rows.carried.empty()) {
      CarriedRow& carried = rows.carried[r];
      carried.master = carried.average = {};
      carried.carried.master = carried.carried.average = {};
    }
    rows.counts[r] = 0;
    rows.cold[r].state_problem = !rows.hot[r].problem && needed(groups, rows, r) ? kNoState : nullptr;
  }
  state_dicts_.assign(rows.size(), nullptr);
  entries_.assign(rows.size(), {});
  keys_.clear();
  position = 0;
  while (PyDict_Next(state, &position, &key, &value)) {
    const auto found = row_of.find(key);
    if (found == row_of.end() || !PyDict_Check(value)) continue;
    const size_t r = found->second;
    if (!rows.cold[r].state_problem) continue;
    state_dicts_[r] = value;
    entries_[r].position = position - 1;
    dicts_.know(kFirst + r, value);
    rows.cold[r].state_problem = find_row(r, needed(groups, rows, r), counts ? &hidden : nullptr, rows);
    if (rows.cold[r].state_problem) state_dicts_[r] = nullptr;
  }
  incomplete_ = std::any_of(rows.cold.begin(), rows.cold.end(), [](const ColdRow& row) { return row.state_problem; });
}

void States::refresh(PyObject* state, PyObject* counts, const Groups& groups, Rows& rows, Problems& problems,
                     bool looked) {
  if (!std::exchange(known_, false) || (!looked && !follow(state, counts, rows))) {
    find(state, counts, groups, rows);
    if (!follow(state, counts, rows)) throw std::runtime_error("the optimizer's state changed while it was read");
  }
  known_ = true;
  if (!incomplete_) return;
  for (size_t r = 0; r < rows.size(); ++r) {
    const char* const problem = rows.cold[r].state_problem;
    if (!rows.table[r].grad.data || !problem) continue;
    problems.push_back({r, problem});
    known_ = false;  // whoever is told will mend it
  }
}

}  // namespace fusedopt::plan
