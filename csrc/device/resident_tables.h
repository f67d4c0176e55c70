// The tables of one device, kept there from step to step.
#pragma once
#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

#include "launch.h"
#include "work.h"

namespace fusedopt::device {

// Where kernels can read the numbers of one step that are tensors: in place, or in a copy made by the stream, which a
// graph makes anew at each replay.
class LiveNumbers {
 public:
  explicit LiveNumbers(at::Device device) : device_(device) {}

  // Before each step.
  void clear() { copies_.clear(); }
  const void* address(c10::TensorImpl* impl, DType& dtype);
  Operand operand(const Number& number);

 private:
  const at::Device device_;
  std::unordered_map<c10::TensorImpl*, at::Tensor> copies_;
};

// Neighbouring rows that one update takes.
struct Run {
  uint64_t kind;  // what their columns have in common; 0 when none of them takes part
  uint32_t first_chunk, chunk_count;
  size_t like;  // where the table's host copy has one of them
};

// A host copy of the tables tells what has changed since they were last uploaded.
class ResidentTables {
 public:
  ResidentTables(const Launcher& launcher, at::Device device) : launcher_(launcher), device_(device) {}

  // Makes the tables of the rows on this device ready for this step; false when none of them takes part.
  bool prepare(const Work& work, int ordinal, const Place& place, LiveNumbers& numbers);
  // After a failure nothing is known of what is on the device.
  void forget() { known_.clear(); }

  // Of the last prepare():
  const Tables& tables() const { return tables_; }
  const std::vector<Run>& runs() const { return runs_; }
  // Whether a row needs more than its rule; see UpdateArguments.
  bool carries() const { return carries_; }
  const Row& like(const Run& run) const { return *reinterpret_cast<const Row*>(host_.data() + run.like); }

 private:
  bool find_rows(const Work& work, int ordinal);
  void sort_rows(const Work& work);
  void lay_out(const Work& work, LiveNumbers& numbers);
  void lay_out_groups(const Work& work, LiveNumbers& numbers, size_t groups);
  void lay_out_rows(const Work& work, size_t rows, size_t grads);
  void extend_runs(const Work& work, uint64_t kind, uint32_t first_chunk, uint32_t chunk_count, size_t row);
  char* reserve(const Work& work, const Place& place, size_t size);
  void upload(const Place& place, char* base);

  const Launcher& launcher_;
  const at::Device device_;
  Tables tables_{};
  std::vector<uint32_t> mine_;      // plan's rows on this device
  std::vector<char> host_, known_;  // the uploaded part of the tables: now, and as it is on the device
  std::vector<int64_t> structure_;  // numbers of elements, for which the chunk map was made
  std::vector<Run> runs_;
  bool carries_ = false;
  std::vector<Layout> layouts_;       // of columns that are not flat
  at::Tensor memory_;                 // has the tables
  void* memory_stream_ = nullptr;     // for which it was allocated
  at::Tensor captured_;               // has the tables of a step that is being captured
  std::vector<at::Tensor> emulated_;  // has those of all, where no graph has memory of its own
};

}  // namespace fusedopt::device
