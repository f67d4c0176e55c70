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

 private:
  at::Device device_of(int ordinal) const;
  DevicePasses& passes_of(int ordinal);
  Outcome run(const Work& work, const StepSettings& settings, const Wait& wait,
              const std::vector<DevicePasses*>& active);
  void find_statistics(const Work& work, const StepSettings& settings, const std::vector<DevicePasses*>& active,
                       const Report& report);
  Outcome without_work(const StepSettings& settings, at::Device device) const;

  const Launcher& launcher_;
  const c10::DeviceType type_;
  const std::function<void*(int)> stream_of_;
  std::vector<std::unique_ptr<DevicePasses>> passes_;  // by device
};

}  // namespace fusedopt::device
