#include "cpu_step.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

namespace fusedopt::plan {
namespace {

// A step of fewer elements than this keeps the GIL: it is over before another thread would have got it. To hold what
// another thread might free takes as long for each row as the update of some hundred elements, so steps of many small
// rows keep it too, unless they take longer than what Python's threads wait for each other anyway.
constexpr int64_t kUnlockElements = 1 << 18, kUnlockElementsPerRow = 1024, kLongElements = 1 << 24;

template <class T>
at::Tensor tensor_of(at::IntArrayRef sizes, at::ScalarType dtype, std::initializer_list<double> values) {
  at::Tensor tensor = at::detail::empty_cpu(sizes, dtype);
  T* to = static_cast<T*>(tensor.mutable_data_ptr());
  for (double value : values) *to++ = static_cast<T>(value);
  return tensor;
}

cpu::Work work_of(const Rows& rows) { return {rows.table, rows.chunks, rows.participants.elements, rows.overlaps}; }

bool is_long(const Rows& rows) {
  const int64_t each = kUnlockElementsPerRow * static_cast<int64_t>(rows.size());
  return rows.participants.elements >= std::clamp(each, kUnlockElements, kLongElements);
}

// While there is one, other threads may run if the step is long. What it works on is held by whoever makes one.
class Unlocked {
 public:
  explicit Unlocked(const Rows& rows) {
    if (is_long(rows)) released_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> released_;
};

py::object wrapped(at::Tensor tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor))); }

}  // namespace

void CpuStep::derive_scalars(const Groups& groups, const Rows& rows) {
  struct Memo {
    double step = std::numeric_limits<double>::quiet_NaN();
    uint32_t scalars = 0;
  };
  const std::vector<const HyperValues*>& table = groups.table();
  std::vector<Memo> memo(table.size());
  scalars_.clear();
  scalars_of_row_.resize(rows.size());
  for (size_t r = 0; r < rows.size(); ++r) {
    const TensorRow& row = rows.table[r];
    if (!row.grad.data) continue;
    const double step = rows.counts[r] + 1;
    Memo& known = memo[row.group];
    if (known.step != step) {
      const double* hyper = table[row.group]->value;
      known = {step, static_cast<uint32_t>(scalars_.size())};
      scalars_.emplace_back();
      RowScalars& derived = scalars_.back();
      rule_.derive(hyper, step, &derived.values);
      derived.variant = rule_.variant(hyper, step);
      derived.step = static_cast<uint32_t>(static_cast<uint64_t>(step));
      derived.average_weight = average_weight(average_, step);
    }
    scalars_of_row_[r] = known.scalars;
  }
}

// The statistics pass.
std::vector<CpuStep::Found> CpuStep::add_up(const Rows& rows, const StepSettings& s, uint32_t domains) {
  const bool nonfinite = cpu::statistics(work_of(rows), s.norm, partials_);
  std::vector<Found> found(domains);
  for (Found& each : found) each.nonfinite = nonfinite;
  for (size_t c = 0; c < partials_.size(); ++c) {
    Found& mine = found[domains > 1 ? rows.domains[rows.chunks[c].row] : 0];
    mine.total = add_totals(s.norm.kind, partials_[c], mine.total);
  }
  return found;
}

CpuStep::Outcome CpuStep::conclude(const StepSettings& s, const Found* found, size_t count) const {
  Found all;
  for (size_t i = 0; i < count; ++i) {
    all.total = add_totals(s.norm.kind, found[i].total, all.total);
    if (found[i].nonfinite != 0) all.nonfinite = 1;
  }
  Outcome outcome;
  outcome.skip = s.check ? all.nonfinite != 0 : s.has_found_inf && s.found_inf.value != 0;
  outcome.norm = norm_of(s.norm, all.total) * (1.0 / s.scale.value);
  if (s.mode() == Mode::kFull) outcome.coefficient = clip_coefficient(outcome.norm, s.max_norm.value);
  return outcome;
}

// The update pass. Returns whether it was refused.
bool CpuStep::update(const Rows& rows, const StepSettings& s, const Outcome& outcome) {
  const bool full = s.mode() == Mode::kFull;
  const bool refused = full && s.error_if_nonfinite && !outcome.skip && !std::isfinite(outcome.norm);
  if (!outcome.skip && !refused) {
    const double multiplier = 1.0 / s.scale.value * outcome.coefficient;
    cpu::update(work_of(rows), rule_.id, {scalars_, scalars_of_row_}, {multiplier, s.clip_value, s.write_back});
  }
  return refused;
}

void CpuStep::settle(const Rows& rows, const StepSettings& s, const Outcome& outcome, bool refused) const {
  if (refused) refuse_norm(outcome.norm);
  if (outcome.skip) return;
  rows.count_up(s.write_back, /*steps=*/true);
}

CpuStep::Outcome CpuStep::run_passes(const Groups& groups, const Rows& rows, const StepSettings& s) {
  if (!rows.participants.any) return conclude(s, nullptr, 0);
  derive_scalars(groups, rows);
  Outcome outcome;
  bool refused;
  // Until the step is counted, which writes to what it worked on.
  const Held held = is_long(rows) ? rows.hold() : Held();
  {
    const Unlocked unlocked(rows);
    const std::vector<Found> found = s.mode() == Mode::kBare ? std::vector<Found>() : add_up(rows, s, 1);
    outcome = conclude(s, found.data(), found.size());
    refused = update(rows, s, outcome);
  }
  settle(rows, s, outcome, refused);
  return outcome;
}

py::object CpuStep::reported(const Rows& rows, const StepSettings& s, const Outcome& outcome) const {
  py::object scalars = py::none(), found_inf = py::none();
  if (s.mode() == Mode::kFull) {
    scalars =
        wrapped(rows.participants.any_double ? tensor_of<double>({2}, at::kDouble, {outcome.norm, outcome.coefficient})
                                             : tensor_of<float>({2}, at::kFloat, {outcome.norm, outcome.coefficient}));
  }
  if (s.has_found_inf || (s.check && rows.participants.any)) {
    found_inf = wrapped(tensor_of<float>({}, at::kFloat, {outcome.skip ? 1.0 : 0.0}));
  }
  return py::make_tuple(scalars, found_inf);
}

py::object CpuStep::run(const Groups& groups, const Rows& rows, const StepSettings& s) {
  return reported(rows, s, run_passes(groups, rows, s));
}

at::Tensor CpuStep::find(const Rows& rows, const StepSettings& s, uint32_t domains) {
  if (!rows.participants.any) return {};
  std::vector<Found> found(domains);
  if (s.mode() != Mode::kBare) {
    const Unlocked unlocked(rows);
    found = add_up(rows, s, domains);
  }
  at::Tensor pairs = at::detail::empty_cpu({1, domains, 2}, at::kDouble);
  std::memcpy(pairs.mutable_data_ptr(), found.data(), domains * sizeof(Found));
  return pairs;
}

py::object CpuStep::finish(const Groups& groups, const Rows& rows, const StepSettings& s, const at::Tensor& pairs) {
  derive_scalars(groups, rows);
  const auto* found = static_cast<const Found*>(pairs.const_data_ptr());
  const Outcome outcome = conclude(s, found, static_cast<size_t>(pairs.numel() / 2));
  bool refused;
  {
    const Unlocked unlocked(rows);
    refused = update(rows, s, outcome);
  }
  settle(rows, s, outcome, refused);
  return reported(rows, s, outcome);
}

}  // namespace fusedopt::plan
