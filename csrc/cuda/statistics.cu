// The statistics pass: the norm of all gradients and whether they are finite, and what follows from that for the step.
//
// Each block adds up one chunk, in double from the first addition, into a partial of its own. The last block to finish
// adds the partials up in order, derives the scalars of the step and of every row, and counts the steps. So the norm
// has the same bits whatever the order in which blocks run, the host waits for nothing, and the update finds all it
// needs.
#include "access.h"
#include "block.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {
namespace {

// 16-byte loads of a thread in flight, before the first of them is used: as many as there are registers for.
template <NormKind K>
constexpr int kUnroll = K == NormKind::kInf || K == NormKind::kP ? 2 : 4;

template <NormKind K>
struct Sum {
  double value = 0;
  bool nonfinite = false;

  __device__ __forceinline__ void take(double magnitude, double p) {
    if constexpr (K == NormKind::kOne) value += magnitude;
    if constexpr (K == NormKind::kInf) value = nan_max(magnitude, value);
    if constexpr (K == NormKind::kP) value += power(magnitude, p);
  }

  // In float, a sum of finite elements cannot overflow the double it ends up in: then the sum tells.
  template <class T>
  static constexpr bool kTells = sizeof(T) == 4 && (K == NormKind::kOne || K == NormKind::kTwo);

  template <class T>
  __device__ __forceinline__ void add(T x, double p) {
    if constexpr (!kTells<T>) nonfinite |= x - x != T(0);
    if constexpr (K == NormKind::kTwo) {
      const double wide = x;
      value = sizeof(T) == 4 ? add_exact_product(value, wide, wide) : value + wide * wide;
    } else if constexpr (K != NormKind::kNone) {
      take(static_cast<double>(x < T(0) ? -x : x), p);
    }
  }

  // A few elements at once. Not `exact`, they are first added up in float.
  template <bool kExact, class T, int kCount>
  __device__ __forceinline__ void add_all(const T (&x)[kCount], double p) {
    if constexpr (!kExact && kTells<T>) {
      T sum = 0;
      for (int i = 0; i < kCount; ++i) sum += K == NormKind::kTwo ? x[i] * x[i] : (x[i] < T(0) ? -x[i] : x[i]);
      value += static_cast<double>(sum);
    } else {
      for (int i = 0; i < kCount; ++i) add(x[i], p);
    }
  }
};

template <NormKind K>
struct Combine {
  __device__ __forceinline__ double operator()(double a, double b) const { return add_totals(K, a, b); }
};

// A gradient during a chunk.
struct Gradient {
  const char* data;
  const Layout* layout;  // null when flat
  DType dtype;
  int64_t offset;
  uint32_t length;
};

// T is what the elements are loaded as; kHalves when they are stored in 16 bits.
template <class T, bool kHalves, bool kExact, bool kAligned, NormKind K>
__device__ __forceinline__ void add_aligned_vectors(const Gradient& grad, double p, Sum<K>& sum, uint32_t& done) {
  constexpr int lanes = 16 / (kHalves ? 2 : static_cast<int>(sizeof(T)));
  const char* const first = in_global_memory(grad.data) + grad.offset * (16 / lanes);
  const unsigned alignment = kAligned ? 16u : alignment_of(first);
  const uint32_t vectors = grad.length / lanes;
  for (uint32_t v = threadIdx.x; v < vectors; v += kThreads * kUnroll<K>) {
    uint32_t raw[kUnroll<K>][4] = {};  // zeros add nothing to any norm
#pragma unroll
    for (int u = 0; u < kUnroll<K>; ++u) {
      const uint32_t at = v + u * kThreads;
      if (at < vectors) load_words<4>(raw[u], first + 16 * static_cast<int64_t>(at), alignment);
    }
#pragma unroll
    for (int u = 0; u < kUnroll<K>; ++u) {
      if constexpr (kHalves) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float x[4];
          unpack_halves(x, raw[u] + 2 * part, grad.dtype);
          sum.template add_all<kExact>(x, p);
        }
      } else {
        T x[lanes];
        __builtin_memcpy(x, raw[u], 16);
        sum.template add_all<kExact>(x, p);
      }
    }
  }
  done = vectors * lanes;
}

template <class T, bool kHalves, bool kExact, NormKind K>
__device__ __forceinline__ void add_vectors(const Gradient& grad, double p, Sum<K>& sum, uint32_t& done) {
  // Chunks begin at multiples of 16 bytes.
  if (alignment_of(grad.data) == 16) {
    add_aligned_vectors<T, kHalves, kExact, true>(grad, p, sum, done);
  } else {
    add_aligned_vectors<T, kHalves, kExact, false>(grad, p, sum, done);
  }
}

template <bool kExact, NormKind K>
__device__ Sum<K> add_chunk(const Gradient& grad, double p) {
  Sum<K> sum;
  uint32_t done = 0;
  if (!grad.layout) {
    if (grad.dtype == DType::kFloat32) {
      add_vectors<float, false, kExact>(grad, p, sum, done);
    } else if (grad.dtype == DType::kFloat64) {
      add_vectors<double, false, kExact>(grad, p, sum, done);
    } else {
      add_vectors<float, true, kExact>(grad, p, sum, done);
    }
  }
  for (uint32_t i = done + threadIdx.x; i < grad.length; i += kThreads) {
    const int64_t at = place_of(grad.layout, grad.offset + i);
    if (grad.dtype == DType::kFloat64) {
      sum.add(reinterpret_cast<const double*>(grad.data)[at], p);
    } else {
      sum.add(load_element<float>(grad.data, at, grad.dtype), p);
    }
  }
  if (grad.dtype != DType::kFloat64 && Sum<K>::template kTells<float>) {
    sum.nonfinite = sum.value - sum.value != 0.0;
  }
  return sum;
}

// Below this, a sum of squares in float may have lost small ones to underflow.
constexpr double kUnderflow = 1e-24;

struct StatisticsShared {
  double scratch[kWarps];
  bool flag;
};

template <class Rule>
__device__ void derive_rows(const StatisticsArguments& a, uint32_t begin, uint32_t end) {
  const Tables& tables = a.tables;
  uint32_t known = end;  // the row whose scalars may serve the next as well
  double known_step = 0;
  for (uint32_t r = begin; r < end; ++r) {
    if (!tables.grads[r]) continue;
    const Row& row = tables.rows[r];
    const double step = next_step(row);
    if (known < end && step == known_step && tables.rows[known].group == row.group) {
      tables.scalars[r] = tables.scalars[known];
    } else {
      derive_scalars<Rule>(tables.groups[row.group], step, a.average, &tables.scalars[r]);
    }
    count_step(row, step);
    known = r, known_step = step;
  }
}

// By one block: scalars of the step from the finished sum (thread 0's), then scalars and step counts of the rows.
__device__ void draw_conclusions(const StatisticsArguments& a, double total, bool nonfinite, StatisticsShared& shared) {
  const Tables& tables = a.tables;
  __syncthreads();
  if (threadIdx.x == 0) {
    const double inverse_scale = 1.0 / value_of(a.scale);
    const double norm = norm_of(a.norm, total) * inverse_scale;
    const bool full = a.norm.kind != NormKind::kNone;
    const double coefficient = full ? clip_coefficient(norm, value_of(a.max_norm)) : 1.0;
    bool skip = a.has_found_inf && value_of(a.found_inf) != 0;
    if (a.check) skip = nonfinite;
    if (a.report.scalars && a.report.scalars_are_double) {
      static_cast<double*>(a.report.scalars)[0] = norm;
      static_cast<double*>(a.report.scalars)[1] = coefficient;
    } else if (a.report.scalars) {
      static_cast<float*>(a.report.scalars)[0] = static_cast<float>(norm);
      static_cast<float*>(a.report.scalars)[1] = static_cast<float>(coefficient);
    }
    if (a.report.found_inf) *a.report.found_inf = skip ? 1.0f : 0.0f;
    if (a.refuse_nonfinite && norm - norm != 0.0) skip = true;
    tables.control->multiplier = inverse_scale * coefficient;
    tables.control->skip = skip;
    shared.flag = skip;
  }
  __syncthreads();
  if (shared.flag) return;
  const uint32_t share = (tables.row_count + kThreads - 1) / kThreads, begin = threadIdx.x * share;
  const uint32_t end = begin + share < tables.row_count ? begin + share : tables.row_count;
  switch (a.rule) {
#define FUSEDOPT_DERIVE_ROWS(Rule)    \
  case kRule##Rule:                   \
    derive_rows<Rule>(a, begin, end); \
    break;
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_DERIVE_ROWS)
#undef FUSEDOPT_DERIVE_ROWS
    default:
      break;
  }
}

constexpr uint32_t kAllDomains = ~0u;

// A thread's share of all partials of a domain: every 256th, in order. Several are under way at a time.
template <NormKind K>
__device__ __forceinline__ double add_partials(const Tables& tables, uint32_t domain = kAllDomains) {
  constexpr uint32_t kAtOnce = 8;
  double total = 0;
  for (uint32_t i = threadIdx.x; i < tables.chunk_count; i += kAtOnce * kThreads) {
    double partial[kAtOnce];
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) {
      const uint32_t at = i + k * kThreads;
      bool counts = at < tables.chunk_count;
      if (counts && domain != kAllDomains) counts = tables.rows[tables.chunks[at].row].domain == domain;
      partial[k] = counts ? __ldcg(tables.partials + at) : 0;  // 0 changes no sum and no maximum
    }
#pragma unroll
    for (uint32_t k = 0; k < kAtOnce; ++k) total = Combine<K>()(total, partial[k]);
  }
  return total;
}

template <NormKind K>
__global__ void __launch_bounds__(kThreads, 4) statistics_kernel(const __grid_constant__ StatisticsArguments a) {
  StatisticsShared& shared = block_shared<StatisticsShared>();
  const Tables& tables = a.tables;
  Tally& tally = tables.control->tally[tables.turn];
  let_next_kernel_start();
  const uint32_t c = blockIdx.x;
  if (c < tables.chunk_count) {
    const ChunkEntry chunk = tables.chunks[c];
    const char* const data = static_cast<const char*>(tables.grads[chunk.row]);
    double total = 0;
    bool nonfinite = false;
    if (data) {
      const Row& row = tables.rows[chunk.row];
      Gradient grad{data, row.layout[kGrad] < 0 ? nullptr : tables.layouts + row.layout[kGrad], row.dtype[kGrad],
                    chunk.index * tables.chunk_elements, 0};
      grad.length = chunk_length(tables, row, grad.offset);
      constexpr bool tells = Sum<K>::template kTells<float>;
      Sum<K> sum;
      bool exact = true;
      if (tells && a.slow_double && grad.dtype != DType::kFloat64) {
        sum = add_chunk<false, K>(grad, a.norm.p);
        total = reduce_block(sum.value, shared.scratch, Combine<K>());
        if (threadIdx.x == 0) shared.flag = total - total != 0.0 || (K == NormKind::kTwo && total < kUnderflow);
        __syncthreads();
        exact = shared.flag;
        __syncthreads();
      }
      if (exact) {
        sum = add_chunk<true, K>(grad, a.norm.p);
        total = reduce_block(sum.value, shared.scratch, Combine<K>());
      }
      nonfinite = __syncthreads_or(sum.nonfinite);
    }
    if (threadIdx.x == 0) {
      tables.partials[c] = total;
      if (nonfinite) atomicOr(&tally.nonfinite, 1u);
    }
  }

  if (!is_last_block(tables, gridDim.x, &shared.flag)) return;
  const bool nonfinite = atomicOr(&tally.nonfinite, 0u);
  __syncthreads();
  if (threadIdx.x == 0) tally.nonfinite = 0;
  if (!a.totals) {
    const double total = reduce_block(add_partials<K>(tables), shared.scratch, Combine<K>());
    return draw_conclusions(a, total, nonfinite, shared);
  }
  for (uint32_t d = 0; d < a.domains; ++d) {
    const uint32_t domain = a.domains > 1 ? d : kAllDomains;
    const double total = reduce_block(add_partials<K>(tables, domain), shared.scratch, Combine<K>());
    if (threadIdx.x == 0) {
      a.totals[2 * d] = total;
      a.totals[2 * d + 1] = nonfinite;
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    conclude_kernel(const __grid_constant__ StatisticsArguments a, const double* totals, int count) {
  StatisticsShared& shared = block_shared<StatisticsShared>();
  double total = 0;
  bool nonfinite = false;
  for (int i = 0; i < count; ++i) {
    total = add_totals(a.norm.kind, totals[2 * i], total);
    nonfinite |= totals[2 * i + 1] != 0;
  }
  draw_conclusions(a, total, nonfinite, shared);
}

template <NormKind K>
void launch_statistics(const Place& place, StatisticsArguments a) {
  a.slow_double = slow_double(place.device);
  launch(statistics_kernel<K>, a.tables.chunk_count ? a.tables.chunk_count : 1, place, false, a);
}

}  // namespace

void load_statistics() {
  load_kernel(statistics_kernel<NormKind::kNone>);
  load_kernel(statistics_kernel<NormKind::kOne>);
  load_kernel(statistics_kernel<NormKind::kTwo>);
  load_kernel(statistics_kernel<NormKind::kInf>);
  load_kernel(statistics_kernel<NormKind::kP>);
  load_kernel(conclude_kernel);
}

void statistics(const Place& place, const StatisticsArguments& a) {
  switch (a.norm.kind) {
    case NormKind::kNone:
      return launch_statistics<NormKind::kNone>(place, a);
    case NormKind::kOne:
      return launch_statistics<NormKind::kOne>(place, a);
    case NormKind::kTwo:
      return launch_statistics<NormKind::kTwo>(place, a);
    case NormKind::kInf:
      return launch_statistics<NormKind::kInf>(place, a);
    case NormKind::kP:
      return launch_statistics<NormKind::kP>(place, a);
  }
}

void conclude(const Place& place, const StatisticsArguments& a, const double* totals, int count) {
  launch(conclude_kernel, 1, place, false, a, totals, count);
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
