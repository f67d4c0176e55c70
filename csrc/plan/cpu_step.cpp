#include "cpu_step.h"

#include <ATen/EmptyTensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <utility>

namespace fusedopt::plan {
namespace {

// A step of fewer elements than this keeps the GIL: it is over before another thread would have got it.
constexpr int64_t kUnlockElements = 1 << 18;

// Calls `use` with the step count of a row in its own type.
template <class Use>
void with_count(const TensorRow& row, bool integer, Use use) {
  if (integer) {
    use(*static_cast<int64_t*>(row.step));
  } else if (row.step_dtype == DType::kFloat64) {
    use(*static_cast<double*>(row.step));
  } else {
    use(*static_cast<float*>(row.step));
  }
}

// The steps taken by row `r`.
double count_of(const Rows& rows, size_t r) {
  double count = 0;
  if (!rows.table[r].step) return count;
  with_count(rows.table[r], rows.hot[r].integer_count, [&](auto steps) { count = static_cast<double>(steps); });
  return count;
}

void count_steps(const Rows& rows) {
  for (size_t r = 0; r < rows.size(); ++r) {
    const TensorRow& row = rows.table[r];
    if (!row.grad.data || !row.step) continue;
    with_count(row, rows.hot[r].integer_count, [](auto& steps) { steps += 1; });
  }
}

template <class T>
at::Tensor tensor_of(at::IntArrayRef sizes, at::ScalarType dtype, std::initializer_list<double> values) {
  at::Tensor tensor = at::detail::empty_cpu(sizes, dtype);
  T* to = static_cast<T*>(tensor.mutable_data_ptr());
  for (double value : values) *to++ = static_cast<T>(value);
  return tensor;
}

py::object wrapped(at::Tensor tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor))); }

}  // namespace

void CpuStep::derive_scalars(const Groups& groups, Rows& rows) {
  struct Memo {
    double step = std::numeric_limits<double>::quiet_NaN();
    uint32_t scalars = 0, variant = 0;
  };
  const std::vector<const HyperValues*>& table = groups.table();
  std::vector<Memo> memo(table.size());
  scalars_.clear();
  for (size_t r = 0; r < rows.size(); ++r) {
    TensorRow& row = rows.table[r];
    if (!row.grad.data) continue;
    const double step = count_of(rows, r) + 1;
    Memo& known = memo[row.group];
    if (known.step != step) {
      const double* hyper = table[row.group]->value;
      known = {step, static_cast<uint32_t>(scalars_.size()), rule_.variant(hyper, step)};
      scalars_.emplace_back();
      rule_.derive(hyper, step, &scalars_.back());
    }
    row.scalars = known.scalars;
    row.variant = known.variant;
  }
}

CpuStep::Outcome CpuStep::run_passes(const Groups& groups, Rows& rows, const StepSettings& s) {
  const cpu::Work work{rows.table, rows.chunks, rows.participants.elements, rows.overlaps};
  const bool full = s.mode() == Mode::kFull;
  const double inverse_scale = 1.0 / s.scale.value;
  Outcome outcome;
  outcome.skip = s.has_found_inf && s.found_inf.value != 0;
  if (!rows.participants.any) return outcome;
  derive_scalars(groups, rows);
  std::vector<at::Tensor> held;
  std::optional<py::gil_scoped_release> unlocked;
  if (work.elements >= kUnlockElements) {
    held = rows.hold();
    unlocked.emplace();
  }
  if (s.mode() != Mode::kBare) {
    const cpu::Statistics found = cpu::statistics(work, s.norm, partials_);
    if (s.check) outcome.skip = found.nonfinite;
    outcome.norm = found.norm * inverse_scale;
  }
  if (full) outcome.coefficient = clip_coefficient(outcome.norm, s.max_norm.value);
  const bool refused = full && s.error_if_nonfinite && !outcome.skip && !std::isfinite(outcome.norm);
  if (!outcome.skip && !refused) {
    cpu::update(work, rule_.id, scalars_, {inverse_scale * outcome.coefficient, s.clip_value, s.write_back});
  }
  unlocked.reset();
  if (refused) refuse_norm(outcome.norm);
  if (!outcome.skip) {
    count_steps(rows);
    rows.bump_versions(s.write_back);
  }
  return outcome;
}

py::object CpuStep::run(const Groups& groups, Rows& rows, const StepSettings& s) {
  const Outcome outcome = run_passes(groups, rows, s);
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

}  // namespace fusedopt::plan
