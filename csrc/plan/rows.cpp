#include "rows.h"

#include <algorithm>
#include <utility>

#include "../cpu/executor.h"
#include "../tensors.h"
#include "local.h"
#include "prefetch.h"
#include "ranges.h"

namespace fusedopt::plan {
namespace {

// The parameter itself.
inline c10::TensorImpl* whole_of(PyObject* object) { return THPVariable_Unpack(object).unsafeGetTensorImpl(); }

// Stands for the data of an empty gradient, whose own pointer is null: null means "takes no part".
char kEmpty;

}  // namespace

void Rows::clear() {
  table.clear();
  objects.clear();
  hot.clear();
  states.clear();
  counts.clear();
  cold.clear();
  carried.clear();
  prints.clear();
  dealt_out_ = false;
}

void Rows::add(PyObject* param, uint32_t group, uint32_t index) {
  objects.push_back(param);
  hot.push_back({});
  states.push_back({});
  counts.push_back(0);
  cold.emplace_back();
  cold.back().group = group;
  cold.back().index = index;
  table.push_back({});
  if (precision_.carries()) {
    const auto stream = static_cast<uint32_t>(carried.size());
    carried.emplace_back();
    carried.back().carried.chance = {precision_.seed(), 0, nullptr, stream, precision_.by_chance()};
    table.back().carried = &carried.back().carried;
  }
  describe(size() - 1);
}

void Rows::build_chunks() {
  chunks.clear();
  for (size_t r = 0; r < size(); ++r) {
    for (int64_t offset = 0; offset < table[r].numel; offset += cpu::kChunkElements) {
      const int64_t length = std::min(cpu::kChunkElements, table[r].numel - offset);
      chunks.push_back({static_cast<uint32_t>(r), static_cast<uint32_t>(length), offset});
    }
  }
}

// Whether an object is a tensor, where that can be told without asking Python: torch's own two types, and one more.
[[gnu::always_inline]] inline bool Rows::is_tensor(PyObject* object) const {
  PyTypeObject* const type = Py_TYPE(object);
  return THPVariable_CheckTypeExact(type) || reinterpret_cast<PyObject*>(type) == subclass_.ptr();
}

void Rows::describe(size_t r) {
  HotRow& row = hot[r];
  PyObject* const object = objects[r];
  const at::Tensor& param = local_of(object);
  c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  news_ = true;
  if (!is_tensor(object)) {
    subclass_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(object)));
  }
  cold[r].spec = py::reinterpret_borrow<py::object>(spec_of(object));
  row.dtensor = static_cast<bool>(cold[r].spec);
  dealt_out_ |= row.dtensor;
  table[r].numel = 0;
  cold[r].problem = foreign(impl, target_.type);
  if (!cold[r].problem) {
    row.param.take(impl, prints);
    table[r].numel = impl->numel();
    cold[r].order = CanonicalOrder(impl);
    cold[r].problem = cold[r].order.describe(param, table[r].param, cold[r].param_layout, true);
  }
  row.problem = cold[r].problem;
}

// See Note [Prefetching].
[[gnu::always_inline]] inline void Rows::prefetch_row(size_t r) const {
  const HotRow& row = hot[r];
  prefetch_object(objects[r]);
  __builtin_prefetch(static_cast<const char*>(row.autograd) + 40);
  prefetch_tensor(row.param.impl, true);
  prefetch_storage(row.param.storage);
  prefetch_tensor(row.grad.impl, true);
  prefetch_storage(row.grad.storage);
}

// Takes the parameter of this step, whose part in this process is `impl`. Returns false when it is no longer what the
// tables say, for instance after `param.data = ...`.
[[gnu::always_inline]] inline bool Rows::refresh_param(size_t r, c10::TensorImpl* impl) {
  HotRow& row = hot[r];
  row.param.move_to(impl);
  // Always by its sizes: gradients and states are measured against it.
  return !row.problem && prints[row.param.print].fits(impl);
}

// Takes the gradient of this step. Returns false when it does not lie as the last one did.
[[gnu::always_inline]] inline bool Rows::refresh_grad(size_t r, c10::TensorImpl* impl) {
  HotRow& row = hot[r];
  row.grad.move_to(impl);
  return prints[row.grad.print].fits(impl);
}

void Rows::Seen::add(const Seen& other) {
  participants.elements += other.participants.elements;
  participants.any |= other.participants.any;
  participants.any_double |= other.participants.any_double;
  moved |= other.moved;
  attended.insert(attended.end(), other.attended.begin(), other.attended.end());
}

// Counts in what of a row takes part.
[[gnu::always_inline]] inline void Rows::note(size_t r, Participants& found) const {
  const TensorRow& row = table[r];
  found.any_double |= row.param.dtype == DType::kFloat64;
  if (!row.grad.data) return;
  found.elements += row.numel;
  found.any = true;
}

void Rows::look(size_t begin, size_t end, bool write_back, Seen& seen) {
  for (size_t r = begin; r < std::min(begin + kAhead, end); ++r) prefetch_row(r);
  for (size_t r = begin; r < end; ++r) {
    if (r + kAhead < end) prefetch_row(r + kAhead);
    HotRow& row = hot[r];
    TensorRow& columns = table[r];
    PyObject* const object = objects[r];
    if (!is_tensor(object) || row.dtensor) [[unlikely]] {
      seen.attended.push_back(r);
      continue;
    }
    c10::TensorImpl* const impl = THPVariable_Unpack(object).unsafeGetTensorImpl();
    if (!refresh_param(r, impl)) [[unlikely]] {
      seen.attended.push_back(r);
      continue;
    }
    seen.moved |= replace<void>(columns.param.data, columns.numel ? data_of(impl) : nullptr);
    replace(row.autograd, static_cast<const void*>(impl->autograd_meta()));
    const at::Tensor& grad = impl->grad();
    if (!grad.defined()) {
      replace<void>(columns.grad.data, nullptr);
      note(r, seen.participants);
      continue;
    }
    c10::TensorImpl* const grad_impl = grad.unsafeGetTensorImpl();
    if (!refresh_grad(r, grad_impl) || (columns.numel && !columns.param.data) || (write_back && columns.grad.layout))
        [[unlikely]] {
      seen.attended.push_back(r);
      continue;
    }
    void* const data = columns.numel ? data_of(grad_impl) : &kEmpty;
    if (!data) [[unlikely]] {
      seen.attended.push_back(r);
      continue;
    }
    replace(columns.grad.data, data);
    note(r, seen.participants);
  }
}

// Why the gradient cannot be used, or null. Sets the row's column, whose data is null without a gradient.
const char* Rows::attend_grad(size_t r, bool write_back) {
  HotRow& row = hot[r];
  TensorRow& columns = table[r];
  Column& column = columns.grad;
  column.data = nullptr;
  c10::TensorImpl* const param = whole_of(objects[r]);
  row.autograd = param->autograd_meta();
  const at::Tensor& whole = param->grad();
  if (!whole.defined()) return nullptr;
  if (row.problem) return cold[r].problem;
  PyObject* const object = row.dtensor ? object_of(whole) : nullptr;
  if (object && !dealt_out_alike(objects[r], object)) return "has a gradient that is dealt out in another way";
  const at::Tensor& grad = object ? local_of(object) : whole;
  c10::TensorImpl* impl = grad.unsafeGetTensorImpl();
  if (!refresh_grad(r, impl) || (write_back && column.layout)) {
    row.grad.print = Fingerprints::kNone;
    if (foreign(impl, target_.type) || impl->device() != cold[r].order.device()) {
      return "has a gradient that is not a plain dense tensor on its own device";
    }
    if (cold[r].order.describe(grad, column, cold[r].grad_layout, write_back)) {
      return "has a gradient whose shape or memory layout cannot be used";
    }
    row.grad.take(impl, prints);
  }
  column.data = columns.numel ? data_of(impl) : &kEmpty;
  if (!column.data) return "has a gradient without memory (its storage was freed?)";
  return columns.numel && !columns.param.data ? "has no memory (its storage was freed?)" : nullptr;
}

bool Rows::attend(Seen& seen, bool write_back, Problems& problems) {
  std::sort(seen.attended.begin(), seen.attended.end());
  bool resized = false, same = true;
  for (size_t r : seen.attended) {
    PyObject* const object = objects[r];
    if (!THPVariable_Check(object)) throw py::type_error(place_of(cold[r].group, cold[r].index) + " is not a tensor");
    TensorRow& row = table[r];
    auto refresh = [&] {
      c10::TensorImpl* const impl = local_of(object).unsafeGetTensorImpl();
      const bool as_it_was = refresh_param(r, impl) && spec_of(object) == cold[r].spec.ptr();
      if (as_it_was) seen.moved |= replace(row.param.data, row.numel ? data_of(impl) : nullptr);
      return as_it_was;
    };
    if (!refresh()) {
      const int64_t numel = row.numel;
      const bool had_problem = hot[r].problem;
      describe(r);
      refresh();
      hot[r].grad.print = Fingerprints::kNone;  // it was measured against what the parameter was
      seen.moved = true;
      resized |= numel != row.numel;
      same &= had_problem && hot[r].problem;
    }
    if (const char* problem = attend_grad(r, write_back)) problems.push_back({r, problem});
    note(r, seen.participants);
  }
  participants = seen.participants;
  if (resized) build_chunks();
  if (seen.moved) find_overlaps();
  return same;
}

// Distinct parameters may share memory, as views of one tensor. torch updates them one after the other, and so do we
// then: a single thread walks the rows in order.
void Rows::find_overlaps() {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (const TensorRow& row : table) {
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
  overlaps = false;
  for (size_t i = 1; i < ranges.size(); ++i) overlaps |= ranges[i].first < ranges[i - 1].second;
}

Held Rows::hold() const {
  Held held;
  held.objects.reserve(size());
  held.storages.reserve(size() * (3 + kMaxStates));
  auto hold = [&](const KnownTensor& known) {
    if (!known.impl || !known.storage) return;
    auto* const storage = const_cast<c10::StorageImpl*>(known.storage);
    held.storages.emplace_back(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
  };
  for (size_t r = 0; r < size(); ++r) {
    if (!table[r].grad.data) continue;
    held.objects.push_back(py::reinterpret_borrow<py::object>(objects[r]));
    if (hot[r].dtensor) held.objects.push_back(py::reinterpret_borrow<py::object>(local_slot().of(objects[r])));
    hold(hot[r].param);
    hold(hot[r].grad);
    hold(states[r].step.tensor);
    for (const KnownState& column : states[r].column) hold(column.tensor);
    if (carried.empty()) continue;
    hold(carried[r].master.tensor);
    hold(carried[r].average.tensor);
  }
  return held;
}

void Rows::count_up(bool write_back, bool steps) const {
  auto bump = [](c10::TensorImpl* impl) {
    if (!impl->is_inference()) impl->bump_version();
  };
  // Where a version is counted, once the tensor itself is in the cache. Only prefetched, so what else may lie there
  // does no harm.
  auto counter = [](const c10::TensorImpl* impl) {
    return *reinterpret_cast<const char* const*>(&impl->version_counter());
  };
  for_ranges(size(), !target_.device_kernels, [&](size_t begin, size_t end) {
    auto prefetch_tensor = [&](size_t r) __attribute__((always_inline)) {
      __builtin_prefetch(reinterpret_cast<const char*>(hot[r].param.impl) + 40);
    };
    for (size_t r = begin; r < std::min(begin + 2 * kAhead, end); ++r) prefetch_tensor(r);
    for (size_t r = begin; r < end; ++r) {
      if (r + 2 * kAhead < end) prefetch_tensor(r + 2 * kAhead);
      if (r + kAhead < end && table[r + kAhead].grad.data) __builtin_prefetch(counter(hot[r + kAhead].param.impl) + 16);
      if (!table[r].grad.data) continue;
      if (!prints[hot[r].param.print].inference) hot[r].param.impl->bump_version();
      if (hot[r].dtensor) bump(whole_of(objects[r]));
      if (!write_back) continue;
      const at::Tensor& grad = whole_of(objects[r])->grad();
      if (grad.defined()) bump(grad.unsafeGetTensorImpl());
    }
  });
  // One after the other: parameters may share a count.
  for (size_t r = 0; steps && r < size(); ++r) {
    if (r + 2 * kAhead < size()) __builtin_prefetch(table[r + 2 * kAhead].step);
    const TensorRow& row = table[r];
    if (row.grad.data && row.step) with_count(row, hot[r].integer_count, [](auto& count) { count += 1; });
  }
}

std::string place_of(size_t group, size_t index) {
  return "param_groups[" + std::to_string(group) + "]['params'][" + std::to_string(index) + "]";
}

}  // namespace fusedopt::plan
