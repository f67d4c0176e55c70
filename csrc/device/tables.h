// The tables that device kernels read, and the arguments of their launches. Plain data, the same on host and device.
#pragma once
#include <stdint.h>

#include "../rules/rules.h"
#include "../tables.h"

namespace fusedopt::device {

// Whether the double arithmetic of NVIDIA's GPUs of a compute capability (86 for 8.6) is so slow, 1/32 or 1/64 of
// float, that a norm is first added up in short runs in float. It is slow on all but those made for computing centers.
inline bool has_slow_double(int capability) {
  return capability == 86 || capability == 87 || capability == 88 || capability == 89 || capability == 103 ||
         capability >= 110;
}

// Columns of a row, in the order of kernels.
constexpr int kParam = 0, kGrad = 1, kState = 2, kMaster = kState + kMaxStates, kAverage = kMaster + 1;
constexpr int kColumns = kAverage + 1;

// Note [Adaptive chunks]
// A block works on one chunk of one row. Few elements in all make small chunks, so that every multiprocessor has some;
// many make large ones, so that what a block costs beside its elements does not count. The size is a function of the
// plan's sizes alone, never of the device: a norm is added up chunk by chunk, so with the same kernels it has the same
// bits on any of them.
//
// Why 16384 at most. An H200 runs 528 blocks at a time (132 multiprocessors, 4 blocks each), and the last of them leave
// part of it idle: half a block's time on average. With 300 million parameters of AdamW (28 bytes each, at 4.3 TB/s
// 2 ms), chunks of 65536 make 9 rounds of blocks, so that this is 5 % of the update; 16384 make 35, and 1.4 %. What
// grows instead is the sum over the partials by the last block of a statistics pass: 8 loads in flight in each of 256
// threads, so about 0.25 us for 2048 chunks: 2 us of those 2 ms, in which a block's own beginning, some 2 us in 50,
// is covered by the other three. From some 7 billion parameters on a GPU the next size would be no worse. These are
// estimates, and benchmarks/gpu is to confirm them on a GPU.
constexpr int64_t kLeastChunk = 2048, kMostChunk = 16384, kWantedChunks = 4096;

inline int64_t chunk_elements(int64_t total) {
  int64_t elements = kLeastChunk;
  while (elements < kMostChunk && total / elements > kWantedChunks) elements *= 2;
  return elements;
}

// Chunks of a row.
FUSEDOPT_HD uint32_t chunks_of(int64_t numel, int64_t chunk_elements) {
  return static_cast<uint32_t>((numel + chunk_elements - 1) / chunk_elements);
}

// One distinct set of hyperparameters. Those given as device tensors are read through `live`, at each step, on the
// device; the others are numbers.
struct GroupRow {
  double value[kMaxHyper];
  const void* live[kMaxHyper];
  DType live_dtype[kMaxHyper];
};

// One parameter; the address of its gradient is in a list of its own, because it changes most often.
struct Row {
  void* data[kColumns];
  void* step;
  int64_t numel;
  int32_t layout[kColumns];  // row of the layout table, or kFlat
  uint32_t group;
  uint32_t first_chunk;
  uint32_t domain;  // over which processes its statistics are added up
  DType dtype[kColumns];
  DType step_dtype;
  bool by_chance;   // something is rounded by chance; see Note [Random bits] in csrc/storage.h
  uint32_t stream;  // the parameter's number in its optimizer
  int32_t numbers;  // row of the layout table with the numbers of its elements from `first_number`, or kFlat
  uint64_t first_number;

  static constexpr int32_t kFlat = -1;
};

struct ChunkEntry {
  uint32_t row;
  uint32_t index;  // in its row
};

// What the blocks of a pass add up, apart from the norm; all 0 between passes. See Note [Tickets].
struct Tally {
  uint32_t ticket;     // blocks that are done
  uint32_t nonfinite;  // whether a gradient is not finite
};

struct Control {
  double multiplier;  // inverse scale times clip coefficient
  uint32_t skip;      // whether the update is to change nothing
  Tally tally[2];     // passes use them in turns
};

struct Tables {
  const GroupRow* groups;
  void* const* grads;  // one per row, null where the parameter takes no part
  const Row* rows;
  const Layout* layouts;
  ChunkEntry* chunks;   // the chunk map
  RowScalars* scalars;  // one per row
  double* partials;     // one per chunk
  Control* control;
  uint32_t row_count, chunk_count;
  int64_t chunk_elements;
  uint32_t turn;  // which tally the pass uses
};

// A number that the host knows, or that lies on the device.
struct Operand {
  double value;
  const void* live;  // null when the host knows it
  DType dtype;
};

// Where a step leaves what it found out; null where nobody asked.
struct Report {
  void* scalars;  // norm and clip coefficient
  bool scalars_are_double;
  float* found_inf;
};

struct StatisticsArguments {
  Tables tables;
  StatisticsSettings norm;
  RuleId rule;
  bool check;                // skip when a gradient is not finite
  bool has_found_inf;        // skip when `found_inf` is not zero
  bool refuse_nonfinite;     // skip when the norm is not finite
  Operand scale, found_inf;  // the divisor of the gradients, and what was found elsewhere
  AverageSettings average;
  Operand max_norm;
  Report report;
  double* totals;    // in a first half: receives a total of each domain and whether all is finite; nothing is concluded
  uint32_t domains;  // how many there are
  bool slow_double;  // filled in where it is launched: see has_slow_double()
};

struct UpdateArguments {
  Tables tables;
  RuleId rule;
  bool after_statistics;  // control and scalars are filled in; else each block finds them for itself
  bool reverse;           // last chunk first, for what a statistics pass has left in the cache
  bool write_back, has_found_inf;
  double clip_value;
  Operand scale, found_inf;
  Report report;
  AverageSettings average;
  uint64_t seed;                      // of random bits
  uint32_t first_chunk, chunk_count;  // of this launch
  uint32_t tickets;                   // blocks of all the launches of this pass
  bool carries;                       // a row has more than its rule knows of, or a form that is no dtype of torch's
};

}  // namespace fusedopt::device
