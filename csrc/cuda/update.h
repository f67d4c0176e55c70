// What the kernels of the update pass have in common: what a block does but for the loop over elements.
//
// After a statistics pass all scalars are there. Without one (a bare step) each block derives those of its row, from
// the step count plus one, and the last block counts the steps.
#pragma once
#include "access.h"
#include "block.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {

// In place of update(), for rows that need more than the rule; see carried.cu.
void update_carried(const Place&, const UpdateArguments&, bool early);

namespace {

// What a block needs to know of a column during a chunk. `at` is the chunk's first element in a flat column, and the
// column's in another.
struct Stream {
  char* at;
  const Layout* layout;  // null when flat
  unsigned alignment;
  DType dtype;

  __device__ __forceinline__ char* data() const { return in_global_memory(at); }
};

// What decides how a chunk is worked on: what its columns hold, by DType, and what keeps some of them from being
// accessed in whole vectors.
constexpr unsigned kFloat32s = 1, kFloat64s = 2, kBFloat16s = 4, kFloat16s = 8, kNotFlat = 16, kNotAligned = 32;

// Note [Registers]
// What all threads of a block need is in shared memory and read anew for each vector, after a forget_memory(): held in
// registers it would leave too few for the elements. ptxas reports no spills at 64 registers, and a test sees to it.
struct UpdateShared {
  RowScalars scalars;
  alignas(16) unsigned char job[sizeof(ScalarsStorage) + kColumns * sizeof(Stream) + 64];  // a Job
  bool skip, flag;
};

// A chunk, in the type that is calculated in.
template <class Rule, class T>
struct Job {
  typename Rule::template Scalars<T> scalars;
  T multiplier, bound;
  Stream streams[kColumns];
  int64_t offset;
  uint32_t length;
  unsigned variant, traits;
  bool write_back;

  __device__ __forceinline__ T gradient(T g) const { return clamp(g * multiplier, bound); }
};

// The columns that a set of states (bits as of Rule::columns) makes.
template <unsigned kStates>
__device__ constexpr bool uses(int c) {
  return c < kState || (kStates >> (c - kState) & 1);
}

// Applies the variant of the rule, one of those that have these states.
template <unsigned kStates, int kCount, class Rule, class T, unsigned V = 0>
__device__ __forceinline__ void apply(const Job<Rule, T>& job, T (&x)[kColumns][kCount]) {
  if constexpr (V < Rule::kVariants) {
    if (Rule::columns(V) != kStates || job.variant != V) return apply<kStates, kCount, Rule, T, V + 1>(job, x);
    if constexpr (Rule::columns(V) == kStates) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (sizeof(T) == 8 && i > 0) forget_memory();
        Rule::template update<V>(job.scalars, x[kGrad][i], x[kParam][i], x[kState][i], x[kState + 1][i],
                                 x[kState + 2][i]);
      }
    }
  }
}

// The first variant that has the states of variant V.
template <class Rule>
__device__ constexpr unsigned first_like(unsigned variant) {
  unsigned first = 0;
  while (Rule::columns(first) != Rule::columns(variant)) ++first;
  return first;
}

// Has `Columns` work on a chunk, for the set of states that it is, of all that the rule's variants have.
template <class Columns, class Rule, class T, unsigned V = 0>
__device__ __forceinline__ void with_states(unsigned states, const Job<Rule, T>& job,
                                            const typename Columns::Shared& shared) {
  if constexpr (V < Rule::kVariants) {
    if constexpr (first_like<Rule>(V) == V) {
      if (states == Rule::columns(V)) return Columns::template update<Rule, T, Rule::columns(V)>(job, shared);
    }
    with_states<Columns, Rule, T, V + 1>(states, job, shared);
  }
}

template <class Columns, class Rule, class T>
__device__ __forceinline__ void update_chunk(const UpdateArguments& a, const Row& row, char* grad, int64_t offset,
                                             double multiplier, const RowScalars& scalars,
                                             typename Columns::Shared& shared) {
  static_assert(sizeof(Job<Rule, T>) <= sizeof(shared.job));
  auto& job = *reinterpret_cast<Job<Rule, T>*>(shared.job);
  const unsigned states = Rule::columns(scalars.variant);
  if (threadIdx.x < kWarp) {
    const int c = threadIdx.x;
    unsigned traits = 0;
    if (c < kColumns) {
      const bool used = (0b11 | states << kState) >> c & 1, flat = row.layout[c] < 0;
      const DType dtype = row.dtype[c];
      char* data = c == kGrad ? grad : static_cast<char*>(row.data[c]);
      if (flat) data += offset * element_size(dtype);
      job.streams[c] = {data, flat ? nullptr : a.tables.layouts + row.layout[c], alignment_of(data), dtype};
      if (used) traits = 1u << static_cast<unsigned>(dtype);
      if (used && !flat) traits |= kNotFlat;
      if (used && alignment_of(data) < 16) traits |= kNotAligned;
    }
    traits = __reduce_or_sync(0xffffffffu, traits);
    if (c == 0) {
      job.offset = offset;
      job.length = chunk_length(a.tables, row, offset);
      job.multiplier = T(multiplier), job.bound = T(a.clip_value);
      job.variant = scalars.variant, job.traits = traits;
      job.write_back = a.write_back;
    }
  } else if (threadIdx.x < kWarp + sizeof(job.scalars) / sizeof(T)) {
    static_assert(sizeof(job.scalars) / sizeof(T) <= kWarp);
    // Scalars are nothing but numbers of one type.
    const int i = threadIdx.x - kWarp;
    reinterpret_cast<T*>(&job.scalars)[i] = T(reinterpret_cast<const double*>(&scalars.values)[i]);
  } else if (threadIdx.x / kWarp == 2) {
    Columns::prepare(a, row, grad, offset, states, scalars, shared);
  }
  __syncthreads();
  with_states<Columns>(states, job, shared);
}

// All that a block does. `Columns` says how it works on a chunk:
//   Shared                                            what it keeps in shared memory, an UpdateShared with more
//   prepare(a, row, grad, offset, states, scalars, shared)  is called by the threads of one warp
//   update<Rule, T, states>(job, shared)              is called by all threads, after a barrier
template <class Columns, class Rule>
__device__ __forceinline__ void update_block(const UpdateArguments& a) {
  auto& shared = block_shared<typename Columns::Shared>();
  const Tables& tables = a.tables;
  const uint32_t last = a.first_chunk + a.chunk_count;
  uint32_t c = a.first_chunk + blockIdx.x;
  if (a.reverse) c = last - 1 - blockIdx.x;
  const bool working = blockIdx.x < a.chunk_count;
  const ChunkEntry chunk = working ? tables.chunks[c] : ChunkEntry{0, 0};
  char* const grad = working ? static_cast<char*>(tables.grads[chunk.row]) : nullptr;
  const Row& row = tables.rows[chunk.row];

  double multiplier = 1;
  bool skip;
  if (a.after_statistics) {
    wait_for_previous_kernel();  // all blocks, or what follows this kernel might not wait for the statistics either
    if (!grad) return;
    multiplier = tables.control->multiplier;
    skip = tables.control->skip;
    if (skip) return;
  } else {
    multiplier = 1.0 / value_of(a.scale);
    skip = a.has_found_inf && value_of(a.found_inf) != 0;
    if (threadIdx.x == 0) {
      shared.skip = skip;
      if (grad && !skip) derive_scalars<Rule>(tables.groups[row.group], next_step(row), a.average, &shared.scalars);
    }
    __syncthreads();
  }
  if (grad && !skip) {
    const int64_t offset = chunk.index * tables.chunk_elements;
    const RowScalars& scalars = a.after_statistics ? tables.scalars[chunk.row] : shared.scalars;
    if (row.dtype[kParam] == DType::kFloat64) {
      update_chunk<Columns, Rule, double>(a, row, grad, offset, multiplier, scalars, shared);
    } else {
      update_chunk<Columns, Rule, float>(a, row, grad, offset, multiplier, scalars, shared);
    }
  }
  if (a.after_statistics) return;

  if (!is_last_block(tables, a.tickets, &shared.flag)) return;
  if (threadIdx.x == 0 && a.report.found_inf) *a.report.found_inf = shared.skip ? 1.0f : 0.0f;
  if (shared.skip) return;
  for (uint32_t r = threadIdx.x; r < tables.row_count; r += kThreads) {
    if (tables.grads[r]) count_step(tables.rows[r], next_step(tables.rows[r]));
  }
}

}  // namespace
}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
