// Launches the two passes on one device.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>

#include "../step.h"
#include "launch.h"
#include "resident_tables.h"
#include "work.h"

namespace fusedopt::device {

// In a step: prepare(), load(), statistics() where something is to be found out, conclude() where others have found
// something, too, update().
class DevicePasses {
 public:
  DevicePasses(const Launcher& launcher, at::Device device)
      : launcher_(launcher), device_(device), numbers_(device), resident_(launcher, device) {}

  // Makes the tables of the rows on this device ready for this step; false when none of them takes part.
  bool prepare(const Work& work, int ordinal, const Place& place);
  // Makes the launches of update() ready.
  void load(const Work& work, const StepSettings& settings);
  // With `totals` it leaves a pair of each domain there, for conclude(), and draws no conclusions itself.
  void statistics(const Work& work, const StepSettings& settings, const Report& report, double* totals = nullptr,
                  uint32_t domains = 1);
  void conclude(const double* totals, int count);
  void update(const Work& work, const StepSettings& settings, const Report& report);
  // After a failure nothing is known of what is on the device.
  void forget() { resident_.forget(); }

  at::Device device() const { return device_; }

 private:
  void take_turn(const Work& work);
  void for_each_update(const Work& work, const StepSettings& settings, const Report& report,
                       const std::function<void(const UpdateArguments&, const Row& like)>& launch);

  const Launcher& launcher_;
  const at::Device device_;
  LiveNumbers numbers_;
  ResidentTables resident_;
  Place place_{};      // of this step
  Tables tables_{};    // as resident_ has them, with the turn of the pass
  uint32_t turn_ = 0;  // of the next pass that is not captured
  StatisticsArguments statistics_{};
};

}  // namespace fusedopt::device
