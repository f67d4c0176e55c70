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

// The first device reports what all of them found.
Report report_of(const DevicePasses* passes, const std::vector<DevicePasses*>& active, const Report& report) {
  return passes == active[0] ? report : Report{};
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

Outcome Executor::step(const Work& work, const StepSettings& s, const Wait& wait) {
  const std::vector<int> devices = devices_of(work);
  if (work.capturing && devices.size() > 1) {
    throw std::runtime_error("a step over several devices cannot be captured in a CUDA graph");
  }
  if (work.capturing && s.error_if_nonfinite) {
    throw std::runtime_error(
        "error_if_nonfinite=True reads the norm on the host, which a step captured in a CUDA graph cannot; set it to "
        "False (grad_norm of the optimizer's last_step can be looked at after a replay)");
  }
  try {
    std::vector<DevicePasses*> active;
    for (int device : devices) {
      DevicePasses& passes = passes_of(device);
      const c10::OptionalDeviceGuard guard(passes.device());
      if (passes.prepare(work, device, {device, stream_of_(device)})) active.push_back(&passes);
    }
    if (!active.empty()) return run(work, s, wait, active);
  } catch (...) {
    for (const auto& passes : passes_) {
      if (passes) passes->forget();
    }
    throw;
  }
  return without_work(s, device_of(devices.empty() ? 0 : devices[0]));
}

// What a step says in which no parameter takes part.
Outcome Executor::without_work(const StepSettings& s, at::Device device) const {
  Outcome outcome;
  const auto options = at::TensorOptions().device(device).dtype(at::kFloat);
  if (s.mode() == Mode::kFull) {
    outcome.scalars = at::zeros({2}, options);
    outcome.scalars.select(0, 1).fill_(1);
  }
  if (s.has_found_inf) {
    const at::Tensor given = s.found_inf.live ? s.found_inf.live->detach() : at::full({}, s.found_inf.value, options);
    outcome.found_inf = given.to(options.device(), at::kDouble, /*non_blocking=*/true).ne(0).to(at::kFloat).reshape({});
  }
  return outcome;
}

// The statistics pass. With several devices each is given the sums of all, and draws the same conclusions.
void Executor::find_statistics(const Work& work, const StepSettings& s, const std::vector<DevicePasses*>& active,
                               const Report& report) {
  const bool finds = s.mode() != Mode::kBare;
  if (!finds && !launcher_.prepares_bare) return;
  const bool several = finds && active.size() > 1;
  std::vector<at::Tensor> totals;
  for (DevicePasses* passes : active) {
    const c10::OptionalDeviceGuard guard(passes->device());
    double* total = nullptr;
    if (several) {
      totals.push_back(at::empty({2}, at::TensorOptions().device(passes->device()).dtype(at::kDouble)));
      total = static_cast<double*>(totals.back().mutable_data_ptr());
    }
    passes->statistics(work, s, report_of(passes, active, report), total);
  }
  if (!several) return;
  const auto count = static_cast<int64_t>(active.size());
  for (DevicePasses* passes : active) {
    const c10::OptionalDeviceGuard guard(passes->device());
    const at::Tensor all = at::empty({count, 2}, at::TensorOptions().device(passes->device()).dtype(at::kDouble));
    for (int64_t i = 0; i < count; ++i) all.select(0, i).copy_(totals[static_cast<size_t>(i)], /*non_blocking=*/true);
    passes->conclude(static_cast<const double*>(all.const_data_ptr()), static_cast<int>(count));
  }
}

// The passes, with something to work on.
Outcome Executor::run(const Work& work, const StepSettings& s, const Wait& wait,
                      const std::vector<DevicePasses*>& active) {
  const bool full = s.mode() == Mode::kFull, tells = s.check || s.has_found_inf;
  // A norm that is to be finite is judged as precisely as it was found.
  const bool in_double = work.any_double || (full && s.error_if_nonfinite);
  const auto options = at::TensorOptions().device(active[0]->device()).dtype(in_double ? at::kDouble : at::kFloat);
  Outcome outcome;
  Report report{};
  const bool together = full && tells && !in_double;  // one small allocation
  if (full) {
    outcome.scalars = at::empty({together ? 3 : 2}, options);
    report.scalars = outcome.scalars.mutable_data_ptr();
    report.scalars_are_double = in_double;
    if (together) outcome.found_inf = outcome.scalars.select(0, 2);
  }
  if (tells) {
    if (!together) outcome.found_inf = at::empty({}, options.dtype(at::kFloat));
    report.found_inf = static_cast<float*>(outcome.found_inf.mutable_data_ptr());
  }

  for (DevicePasses* passes : active) {
    const c10::OptionalDeviceGuard guard(passes->device());
    passes->load(work, s);
  }
  find_statistics(work, s, active, report);
  if (full && s.error_if_nonfinite) {
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
  for (DevicePasses* passes : active) {
    const c10::OptionalDeviceGuard guard(passes->device());
    passes->update(work, s, report_of(passes, active, report));
  }
  return outcome;
}

}  // namespace fusedopt::device
