#include "rows.h"

#include <algorithm>
#include <utility>

#include "../cpu/executor.h"
#include "../tensors.h"
#include "local.h"
#include "prefetch.h"

namespace fusedopt::plan {
namespace {

// The parameter itself.
inline c10::TensorImpl* whole_of(const HotRow& row) { return THPVariable_Unpack(row.object).unsafeGetTensorImpl(); }

// Stands for the data of an empty gradient, whose own pointer is null: null means "takes no part".
char kEmpty;

}  // namespace

void Rows::clear() {
  table.clear();
  hot.clear();
  cold.clear();
  carried.clear();
}

void Rows::add(PyObject* param, uint32_t group, uint32_t index) {
  HotRow row{};
  row.object = param;
  row.group = group;
  row.index = index;
  hot.push_back(row);
  cold.emplace_back();
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

void Rows::describe(size_t r) {
  HotRow& row = hot[r];
  const at::Tensor& param = local_of(row.object);
  c10::TensorImpl* impl = param.unsafeGetTensorImpl();
  news_ = true;
  cold[r].spec = py::reinterpret_borrow<py::object>(spec_of(row.object));
  row.dtensor = static_cast<bool>(cold[r].spec);
  table[r].numel = 0;
  row.problem = foreign(impl, target_.type);
  if (row.problem) return;
  row.param.take(impl);
  table[r].numel = impl->numel();
  cold[r].order = CanonicalOrder(impl);
  row.problem = cold[r].order.describe(param, table[r].param, cold[r].param_layout, true);
}

// See Note [Prefetching].
[[gnu::always_inline]] inline void Rows::prefetch_row(size_t r) const {
  const HotRow& row = hot[r];
  __builtin_prefetch(row.object);
  __builtin_prefetch(row.autograd);
  prefetch_tensor(row.param.impl, true);
  prefetch_storage(row.param.fingerprint.storage);
  prefetch_tensor(row.grad.impl, true);
  prefetch_storage(row.grad.fingerprint.storage);
}

// Returns false when the parameter is no longer what the tables say, for instance after `param.data = ...`.
[[gnu::always_inline]] inline bool Rows::refresh_param(size_t r) {
  HotRow& row = hot[r];
  c10::TensorImpl* impl = whole_of(row);
  if (row.dtensor) [[unlikely]]
    impl = local_of(row.object).unsafeGetTensorImpl();
  Fingerprint& known = row.param.fingerprint;
  row.param.impl = impl;
  known.storage = impl->unsafe_storage().unsafeGetStorageImpl();
  // Always by its sizes: gradients and states are measured against it.
  if (row.problem || !known.same_kind(impl) || !known.matches_shape(impl)) return false;
  if (row.dtensor && spec_of(row.object) != cold[r].spec.ptr()) return false;
  table[r].param.data = table[r].numel ? data_of(impl) : nullptr;
  return true;
}

// Why the gradient cannot be used, or null. Sets the row's column, whose data is null without a gradient.
[[gnu::always_inline]] inline const char* Rows::refresh_grad(size_t r, bool write_back) {
  HotRow& row = hot[r];
  TensorRow& columns = table[r];
  Column& column = columns.grad;
  column.data = nullptr;
  c10::TensorImpl* const param = row.dtensor ? whole_of(row) : row.param.impl;
  row.autograd = param->autograd_meta();
  const at::Tensor& whole = param->grad();
  if (!whole.defined()) return nullptr;
  if (row.problem) return row.problem;
  PyObject* const object = row.dtensor ? object_of(whole) : nullptr;
  if (object && !dealt_out_alike(row.object, object)) return "has a gradient that is dealt out in another way";
  const at::Tensor& grad = object ? local_of(object) : whole;
  c10::TensorImpl* impl = row.grad.impl = grad.unsafeGetTensorImpl();
  if (!row.grad.fingerprint.same_kind(impl)) {
    if (foreign(impl, target_.type) || impl->device() != cold[r].order.device()) {
      return "has a gradient that is not a plain dense tensor on its own device";
    }
    to_dtype(impl, column.dtype);
    row.grad.fingerprint.take(impl);
  }
  row.grad.fingerprint.storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (!columns.param.layout && shape_of(impl) == row.param.fingerprint.shape) {
    column.layout = nullptr;
  } else if (cold[r].order.describe(grad, column, cold[r].grad_layout, write_back)) {
    return "has a gradient whose shape or memory layout cannot be used";
  }
  column.data = columns.numel ? data_of(impl) : &kEmpty;
  if (!column.data) return "has a gradient without memory (its storage was freed?)";
  return columns.numel && !columns.param.data ? "has no memory (its storage was freed?)" : nullptr;
}

bool Rows::refresh(bool write_back, Problems& problems) {
  Participants found;
  bool resized = false, moved = false, same = true;
  const size_t count = size();
  for (size_t r = 0; r < std::min(kAhead, count); ++r) prefetch_row(r);
  for (size_t r = 0; r < count; ++r) {
    if (r + kAhead < count) prefetch_row(r + kAhead);
    const TensorRow& row = table[r];
    const void* data = row.param.data;
    if (!refresh_param(r)) {
      const int64_t numel = row.numel;
      const bool had_problem = hot[r].problem;
      describe(r);
      refresh_param(r);
      moved = true;
      resized |= numel != row.numel;
      same &= had_problem && hot[r].problem;
    }
    moved |= data != row.param.data;
    if (const char* problem = refresh_grad(r, write_back)) problems.push_back({r, problem});
    found.any_double |= row.param.dtype == DType::kFloat64;
    if (!row.grad.data) continue;
    found.elements += row.numel;
    found.any = true;
  }
  participants = found;
  if (resized) build_chunks();
  if (moved) find_overlaps();
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
  auto hold = [&](const c10::TensorImpl* impl) {
    if (impl) held.storages.push_back(impl->unsafe_storage());
  };
  for (size_t r = 0; r < size(); ++r) {
    if (!table[r].grad.data) continue;
    held.objects.push_back(py::reinterpret_borrow<py::object>(hot[r].object));
    if (hot[r].dtensor) {
      held.objects.push_back(py::reinterpret_borrow<py::object>(local_slot().of(hot[r].object)));
    }
    hold(hot[r].param.impl);
    hold(hot[r].grad.impl);
    hold(hot[r].step.impl);
    for (const KnownTensor& column : hot[r].state) hold(column.impl);
    if (carried.empty()) continue;
    hold(carried[r].master.impl);
    hold(carried[r].average.impl);
  }
  return held;
}

void Rows::bump_versions(bool write_back) const {
  // Counting a version up is an atomic operation, which waits for its miss and everything before it: read them first.
  uint32_t versions = 0;
  for (size_t r = 0; r < size(); ++r) {
    c10::TensorImpl* impl = hot[r].param.impl;
    if (table[r].grad.data && !impl->is_inference()) versions += impl->version_counter().current_version();
  }
  asm volatile("" : : "r"(versions));
  auto bump = [](c10::TensorImpl* impl) {
    if (!impl->is_inference()) impl->bump_version();
  };
  for (size_t r = 0; r < size(); ++r) {
    if (!table[r].grad.data) continue;
    bump(hot[r].param.impl);
    if (hot[r].dtensor) bump(whole_of(hot[r]));
    if (!write_back) continue;
    const at::Tensor& grad = whole_of(hot[r])->grad();
    if (grad.defined()) bump(grad.unsafeGetTensorImpl());
  }
}

}  // namespace fusedopt::plan
