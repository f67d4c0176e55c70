#include "executor.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace fusedopt::device {
namespace {

// The devices of rows that can take part, in order.
std::vector<int> devices_of(const Work& work) {
  std::vector<int> devices;
  for (int device : work.devices) {
    if (device == kNowhere || (!devices.empty() && devices.back() == device)) continue;
    devices.push_back(device);
  }
  std::sort(devices.begin(), devices.end());
  devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
  return devices;
}

}  // namespace

bool Executor::capturing(int device) const {
  const c10::OptionalDeviceGuard guard(device_of(device));
  return launcher_.capturing({device, stream_of_(device)});
}

at::Device Executor::device_of(int ordinal) const {
  return {type_, static_cast<c10::DeviceIndex>(type_ == at::kCPU ? -1 : ordinal)};
}

DevicePasses& Executor::passes_of(int ordinal) {
  const auto index = static_cast<size_t>(ordinal);
  if (passes_.size() <= index) passes_.resize(index + 1);
  if (!passes_[index]) passes_[index] = std::make_unique<DevicePasses>(launcher_, device_of(ordinal));
  return *passes_[index];
}

// After a failure nothing is known of what is on the devices.
template <class Result>
Result Executor::guarded(const std::function<Result()>& run) {
  try {
    return run();
  } catch (...) {
    for (const auto& passes : passes_) {
      if (passes) passes->forget();
    }
    throw;
  }
}

// Makes everything ready for the passes, and room for the report; false when no parameter takes part.
bool Executor::begin(const Work& work, const StepSettings& s) {
  const std::vector<int> devices = devices_of(work);
  if (work.capturing && devices.size() > 1) {
    throw std::runtime_error("a step over several devices cannot be captured in a CUDA graph");
  }
  if (work.capturing && s.error_if_nonfinite) {
    throw std::runtime_error(
        "error_if_nonfinite=True reads the norm on the host, which a step captured in a CUDA graph cannot; set it to "
        "False (grad_norm of the optimizer's last_step can be looked at after a replay)");
  }
  active_.clear();
  outcome_ = {};
  report_ = {};
  for (int device : devices) {
    DevicePasses& passes = passes_of(device);
    const c10::OptionalDeviceGuard guard(passes.device());
    if (passes.prepare(work, device, {device, stream_of_(device)})) active_.push_back(&passes);
  }
  if (active_.empty()) return false;

  const bool full = s.mode() == Mode::kFull, tells = s.check || s.has_found_inf;
  // A norm that is to be finite is judged as precisely as it was found.
  const bool in_double = work.any_double || (full && s.error_if_nonfinite);
  const auto options = at::TensorOptions().device(active_[0]->device()).dtype(in_double ? at::kDouble : at::kFloat);
  const bool together = full && tells && !in_double;  // one small allocation
  if (full) {
    outcome_.scalars = at::empty({together ? 3 : 2}, options);
    report_.scalars = outcome_.scalars.mutable_data_ptr();
    report_.scalars_are_double = in_double;
    if (together) outcome_.found_inf = outcome_.scalars.select(0, 2);
  }
  if (tells) {
    if (!together) outcome_.found_inf = at::empty({}, options.dtype(at::kFloat));
    report_.found_inf = static_cast<float*>(outcome_.found_inf.mutable_data_ptr());
  }
  for (DevicePasses* passes : active_) {
    const c10::OptionalDeviceGuard guard(passes->device());
    passes->load(work, s);
  }
  return true;
}

// The first device reports what all of them found.
const Report& Executor::report_of(const DevicePasses* passes) const {
  static const Report nothing{};
  return passes == active_[0] ? report_ : nothing;
}

// What a step says in which no parameter takes part.
Outcome Executor::without_work(const Work& work, const StepSettings& s) const {
  const std::vector<int> devices = devices_of(work);
  const at::Device device = device_of(devices.empty() ? 0 : devices[0]);
  Outcome outcome;
  const auto options = at::TensorOptions().device(device).dtype(at::kFloat);
  if (s.mode() == Mode::kFull) {
    outcome.scalars = at::zeros({2}, options.dtype(work.any_double ? at::kDouble : at::kFloat));
    outcome.scalars.select(0, 1).fill_(1);
  }
  if (s.has_found_inf) {
    const at::Tensor given = s.found_inf.live ? s.found_inf.live->detach() : at::full({}, s.found_inf.value, options);
    outcome.found_inf = given.to(options.device(), at::kDouble, /*non_blocking=*/true).ne(0).to(at::kFloat).reshape({});
  }
  return outcome;
}

// The statistics pass of each device. What they found comes together on the first.
at::Tensor Executor::find_totals(const Work& work, const StepSettings& s, uint32_t domains) {
  std::vector<at::Tensor> totals;
  for (DevicePasses* passes : active_) {
    const c10::OptionalDeviceGuard guard(passes->device());
    totals.push_back(at::empty({domains, 2}, at::TensorOptions().device(passes->device()).dtype(at::kDouble)));
    passes->statistics(work, s, report_of(passes), static_cast<double*>(totals.back().mutable_data_ptr()), domains);
  }
  const auto count = static_cast<int64_t>(active_.size());
  if (count == 1) return totals[0].unsqueeze(0);
  const c10::OptionalDeviceGuard guard(active_[0]->device());
  at::Tensor all = at::empty({count, domains, 2}, totals[0].options());
  for (int64_t i = 0; i < count; ++i) all.select(0, i).copy_(totals[static_cast<size_t>(i)], /*non_blocking=*/true);
  return all;
}

// Each device is given what all have found, and draws the same conclusions.
void Executor::conclude(const at::Tensor& pairs) {
  for (DevicePasses* passes : active_) {
    const c10::OptionalDeviceGuard guard(passes->device());
    const at::Tensor here = pairs.to(passes->device(), at::kDouble, /*non_blocking=*/true).contiguous();
    passes->conclude(static_cast<const double*>(here.const_data_ptr()), static_cast<int>(here.numel() / 2));
  }
}

Outcome Executor::update(const Work& work, const StepSettings& s, const Wait& wait) {
  Outcome outcome = std::move(outcome_);
  if (s.mode() == Mode::kFull && s.error_if_nonfinite) {
    double norm = 0;
    bool skipped = false;
    wait([&] {
      const at::Tensor found = outcome.scalars.to(at::kCPU);
      norm = static_cast<const double*>(found.const_data_ptr())[0];
      skipped = outcome.found_inf.defined() && outcome.found_inf.item<float>() != 0;
    });
    if (!skipped && !std::isfinite(norm)) refuse_norm(norm);
    if (!work.any_double) outcome.scalars = outcome.scalars.to(at::kFloat);
  }
  for (DevicePasses* passes : active_) {
    const c10::OptionalDeviceGuard guard(passes->device());
    passes->update(work, s, report_of(passes));
  }
  return outcome;
}

// Where each device finds and concludes by itself, or has nothing to find.
void Executor::prepare_each(const Work& work, const StepSettings& s) {
  if (s.mode() == Mode::kBare && !launcher_.prepares_bare) return;
  for (DevicePasses* passes : active_) {
    const c10::OptionalDeviceGuard guard(passes->device());
    passes->statistics(work, s, report_of(passes));
  }
}

Outcome Executor::step(const Work& work, const StepSettings& s, const Wait& wait) {
  return guarded<Outcome>([&] {
    if (!begin(work, s)) return without_work(work, s);
    if (s.mode() != Mode::kBare && active_.size() > 1) {
      conclude(find_totals(work, s, 1));
    } else {
      prepare_each(work, s);
    }
    return update(work, s, wait);
  });
}

at::Tensor Executor::find(const Work& work, const StepSettings& s, uint32_t domains) {
  return guarded<at::Tensor>([&] {
    if (!begin(work, s)) return at::Tensor();
    if (s.mode() != Mode::kBare) return find_totals(work, s, domains);
    return at::zeros({1, domains, 2}, at::TensorOptions().device(active_[0]->device()).dtype(at::kDouble));
  });
}

Outcome Executor::finish(const Work& work, const StepSettings& s, const Wait& wait, const at::Tensor& pairs) {
  return guarded<Outcome>([&] {
    if (s.mode() == Mode::kBare) {
      prepare_each(work, s);
    } else {
      conclude(pairs);
    }
    return update(work, s, wait);
  });
}

}  // namespace fusedopt::device
