// Runs a step on the devices of a plan.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <vector>

#include "../step.h"
#include "launch.h"
#include "passes.h"
#include "work.h"

namespace fusedopt::device {

struct Outcome {
  at::Tensor scalars;    // norm and clip coefficient, or undefined
  at::Tensor found_inf;  // or undefined
};

class Executor {
 public:
  // `stream_of` tells the stream to use on a device.
  Executor(const Launcher& launcher, c10::DeviceType type, std::function<void*(int device)> stream_of)
      : launcher_(launcher), type_(type), stream_of_(std::move(stream_of)) {}

  // Whether the current stream of a device is capturing a graph.
  bool capturing(int device) const;

  // Throws std::runtime_error when the norm is not finite and that is to be an error; nothing has changed then. What
  // waits for the device is called through `wait`.
  using Wait = std::function<void(const std::function<void()>& read)>;
  Outcome step(const Work& work, const StepSettings& settings, const Wait& wait);
  // The same in two halves. The first returns what was found, by device and domain: pairs of a total and whether a
  // gradient is not finite, (devices, domains, 2) in double on the first device (zeros where nothing is to be found
  // out), or nothing where no parameter takes part. The second is given any number of pairs, (n, 2), and the same work.
  at::Tensor find(const Work& work, const StepSettings& settings, uint32_t domains);
  Outcome finish(const Work& work, const StepSettings& settings, const Wait& wait, const at::Tensor& pairs);

 private:
  at::Device device_of(int ordinal) const;
  DevicePasses& passes_of(int ordinal);
  template <class Result>
  Result guarded(const std::function<Result()>& run);
  bool begin(const Work& work, const StepSettings& settings);
  const Report& report_of(const DevicePasses* passes) const;
  at::Tensor find_totals(const Work& work, const StepSettings& settings, uint32_t domains);
  void conclude(const at::Tensor& pairs);
  void prepare_each(const Work& work, const StepSettings& settings);
  Outcome update(const Work& work, const StepSettings& settings, const Wait& wait);
  Outcome without_work(const Work& work, const StepSettings& settings) const;

  const Launcher& launcher_;
  const c10::DeviceType type_;
  const std::function<void*(int)> stream_of_;
  std::vector<std::unique_ptr<DevicePasses>> passes_;  // by device
  // Of the step that is under way:
  std::vector<DevicePasses*> active_;
  Outcome outcome_;
  Report report_{};
};

}  // namespace fusedopt::device
