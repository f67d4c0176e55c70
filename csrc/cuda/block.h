// What a block does together, and what both passes share.
#pragma once
#include <new>

#include "access.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;

__device__ __forceinline__ double read_number(const void* at, DType dtype) {
  return load_element<double>(static_cast<const char*>(at), 0, dtype);
}

__device__ __forceinline__ double value_of(const Operand& operand) {
  return operand.live ? read_number(operand.live, operand.dtype) : operand.value;
}

// Adds up (or takes the maximum of) one number per thread, in an order that does not depend on anything; the result is
// thread 0's. `scratch` holds kWarps numbers.
template <class Combine>
__device__ double reduce_block(double value, double* scratch, const Combine& combine) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_down_sync(0xffffffffu, value, distance));
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) value = combine(value, scratch[warp]);
  }
  return value;
}

// Note [Tickets]
// Each block of a pass draws a ticket when it is done, and the one that draws the last number finishes the pass.
// Drawing is one atomic operation that acquires and releases at device scope: with the barriers around it, all that the
// blocks before have written is visible to every thread of the last one. The counter wraps at the number of blocks, so
// it is 0 again when all are done, even if the blocks of two passes are mixed. Passes use two tallies in turns, and
// each clears the other's: should one be left with something in it (by steps on two streams that nobody ordered), then
// the pass that uses it goes wrong, and the next two are right again. A captured step begins with a cleared control, at
// each replay.

// Whether this is the last block of a pass to get here. What the others wrote before is then visible; `flag` is shared.
__device__ __forceinline__ bool is_last_block(const Tables& tables, uint32_t blocks, bool* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) tables.control->tally[tables.turn ^ 1] = {0, 0};
    *flag = draw_ticket(&tables.control->tally[tables.turn].ticket, blocks) == blocks - 1;
  }
  __syncthreads();
  return *flag;
}

// Elements of the chunk that begins at `offset` of a row.
__device__ __forceinline__ uint32_t chunk_length(const Tables& tables, const Row& row, int64_t offset) {
  const int64_t left = row.numel - offset;
  return static_cast<uint32_t>(left < tables.chunk_elements ? left : tables.chunk_elements);
}

// The number of the step that row `r` is about to make.
__device__ __forceinline__ double next_step(const Row& row) {
  return row.step ? read_number(row.step, row.step_dtype) + 1 : 1;
}

__device__ __forceinline__ void count_step(const Row& row, double step) {
  if (!row.step) return;
  if (row.step_dtype == DType::kFloat64) {
    *static_cast<double*>(row.step) = step;
  } else {
    *static_cast<float*>(row.step) = static_cast<float>(step);
  }
}

template <class Rule>
__device__ void derive_scalars(const GroupRow& group, double step, const AverageSettings& average, RowScalars* out) {
  double hyper[kMaxHyper];
  for (int i = 0; i < kMaxHyper; ++i) {
    hyper[i] = group.live[i] ? read_number(group.live[i], group.live_dtype[i]) : group.value[i];
  }
  // Stored as numbers: a copy of bytes would be stored byte by byte.
  new (&out->values) typename Rule::template Scalars<double>(Rule::derive(hyper, step));
  out->variant = Rule::variant(hyper, step);
  out->step = static_cast<uint32_t>(static_cast<uint64_t>(step));
  out->average_weight = average_weight(average, step);
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
