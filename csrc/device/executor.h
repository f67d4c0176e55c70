// Runs the two passes on devices: keeps their tables there, and launches the kernels.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "../step.h"
#include "launch.h"

namespace fusedopt::device {

// Stands for the device of a row that no kernel can work on, and that takes no part.
constexpr int kNowhere = -1;

// What a plan works on in one step; owned by the plan.
struct Work {
  const std::vector<TensorRow>& rows;
  const std::vector<int>& devices;  // of each row, or kNowhere
  const std::vector<const HyperValues*>& groups;
  RuleId rule;
  bool any_double;  // a row that takes part is in float64
  bool overlaps;    // rows share memory: the update takes one after the other
  bool capturing;   // the current stream of a device is capturing a graph
};

struct Outcome {
  at::Tensor scalars;    // norm and clip coefficient, or undefined
  at::Tensor found_inf;  // or undefined
};

// The tables of one device. A host copy of them tells what has changed since they were last uploaded.
class Executor {
 public:
  Executor(const Launcher& launcher, at::Device device) : launcher_(launcher), device_(device) {}

  // Makes the tables of the rows on this device ready for this step; false when none of them takes part.
  bool prepare(const Work& work, int ordinal, const Place& place);

  // Makes the launches of update() ready.
  void load(const Work& work, const StepSettings& settings);
  void statistics(const Work& work, const StepSettings& settings, const Report& report, double* total);
  void conclude(const double* totals, int count);
  void update(const Work& work, const StepSettings& settings, const Report& report);
  // After a failure nothing is known of what is on the device.
  void forget() { known_.clear(); }

  at::Device device() const { return device_; }

 private:
  const void* live(c10::TensorImpl* impl, DType& dtype);
  Operand operand(const Number& number);
  static uint64_t kind_of(const TensorRow& row);
  void sort_rows(const Work& work);
  void take_turn(const Work& work);
  void lay_out(const Work& work);
  void upload(char* base);
  void for_each_update(const Work& work, const StepSettings& settings, const Report& report,
                       const std::function<void(const UpdateArguments&, const Row& like)>& launch);

  // Neighbouring rows that one update takes.
  struct Run {
    uint64_t kind;
    uint32_t first_chunk, chunk_count;
    size_t like;  // offset of one of them in host_
  };

  const Launcher& launcher_;
  const at::Device device_;
  Place place_{};
  Tables tables_{};
  uint32_t turn_ = 0;  // of the next pass that is not captured
  StatisticsArguments statistics_{};
  std::vector<uint32_t> mine_;      // plan's rows on this device
  std::vector<char> host_, known_;  // the uploaded part of the tables: now, and as it is on the device
  std::vector<int64_t> structure_;  // numbers of elements, for which the chunk map was made
  std::vector<Run> runs_;
  std::vector<Layout> layouts_;  // of columns that are not flat
  // Copies of numbers that were not where kernels can read them; of this step.
  std::unordered_map<c10::TensorImpl*, at::Tensor> copies_;
  at::Tensor memory_;                 // has the tables
  void* memory_stream_ = nullptr;     // for which it was allocated
  at::Tensor captured_;               // has the tables of a step that is being captured
  std::vector<at::Tensor> emulated_;  // has those of all, where no graph has memory of its own
};

// All devices of one plan.
class Runner {
 public:
  // `stream_of` tells the stream to use on a device.
  Runner(const Launcher& launcher, c10::DeviceType type, std::function<void*(int device)> stream_of)
      : launcher_(launcher), type_(type), stream_of_(std::move(stream_of)) {}

  // Whether the current stream of a device is capturing a graph.
  bool capturing(int device) const;

  // Throws std::runtime_error when the norm is not finite and that is to be an error; nothing has changed then. What
  // waits for the device is called through `wait`.
  using Wait = std::function<void(const std::function<void()>& read)>;
  Outcome step(const Work& work, const StepSettings& settings, const Wait& wait);

 private:
  at::Device device_of(int ordinal) const;
  Executor& executor_of(int ordinal);
  void run(const Work& work, const StepSettings& settings, const Wait& wait, const std::vector<Executor*>& active,
           Outcome& outcome);

  const Launcher& launcher_;
  const c10::DeviceType type_;
  const std::function<void*(int)> stream_of_;
  std::vector<std::unique_ptr<Executor>> executors_;  // by device
};

}  // namespace fusedopt::device
