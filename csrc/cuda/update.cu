// The update pass: unscaling, clipping, weight decay and the rule, one block per chunk.
//
// After a statistics pass all scalars are there. Without one (a bare step) each block derives those of its row, from
// the step count plus one, and the last block counts the steps.
#include "access.h"
#include "block.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {
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

// The columns that a set of states (bits as of Rule::columns) makes, and the words of one access: fewer where five
// columns have to be held at once.
template <unsigned kStates>
__device__ constexpr bool uses(int c) {
  return c < kState || (kStates >> (c - kState) & 1);
}
template <unsigned kStates>
constexpr int kWords = kStates == 0b111 ? 2 : 4;

// Applies the variant of the rule, one of those that have these states.
template <unsigned kStates, int kCount, class Rule, class T, unsigned V = 0>
__device__ __forceinline__ void apply(const Job<Rule, T>& job, T (&x)[kColumns][kCount]) {
  if constexpr (V < Rule::kVariants) {
    if (Rule::columns(V) != kStates || job.variant != V) return apply<kStates, kCount, Rule, T, V + 1>(job, x);
    if constexpr (Rule::columns(V) == kStates) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        Rule::template update<V>(job.scalars, x[kGrad][i], x[kParam][i], x[kState][i], x[kState + 1][i],
                                 x[kState + 2][i]);
      }
    }
  }
}

// What the columns of a chunk hold: all the same, or each floats or 16-bit elements.
enum class Mix { kFloat32, kBFloat16, kFloat16, kAny };

// Elements that a thread works on before it goes on to its next ones. See Note [Vectors].
template <unsigned kStates, Mix kMix>
constexpr int kLanes = kMix == Mix::kFloat32 || kMix == Mix::kAny ? kWords<kStates> : 2 * kWords<kStates>;

// Note [Vectors]
// A thread takes some neighbouring elements of all columns, the next thread those after them, so each access of a warp
// touches every sector of 32 bytes once. Where all columns hold 16-bit elements, that is 8 of them, 16 bytes of each
// column, worked on in two parts. Else it is 4: 16 bytes of a column of floats, and 8 of one of 16-bit elements. With
// kAligned there is no branch on alignment between one load and the next.
template <unsigned kStates, Mix kMix, bool kAligned, class Rule>
__device__ __forceinline__ void update_vectors(const Job<Rule, float>& job, uint32_t vectors) {
  constexpr int words = kWords<kStates>, lanes = kLanes<kStates, kMix>, parts = lanes / words;
  const Stream(&streams)[kColumns] = job.streams;
  auto alignment = [&](int c) { return kAligned ? 16u : streams[c].alignment; };
  auto dtype = [&](int c) {
    return kMix == Mix::kFloat32    ? DType::kFloat32
           : kMix == Mix::kBFloat16 ? DType::kBFloat16
           : kMix == Mix::kFloat16  ? DType::kFloat16
                                    : streams[c].dtype;
  };
  for (uint32_t v = threadIdx.x; v < vectors; v += kThreads) {
    auto place = [&](int c) {
      const uint32_t bytes = dtype(c) == DType::kFloat32 ? 4 * lanes : 2 * lanes;
      return streams[c].data() + static_cast<uint64_t>(v) * bytes;
    };
    uint32_t raw[kColumns][words];
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      forget_memory();
      if (part == 0) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          if (!uses<kStates>(c)) continue;
          if (kMix != Mix::kAny || dtype(c) == DType::kFloat32) {
            load_words<words>(raw[c], place(c), alignment(c));
          } else {
            load_words<words / 2>(raw[c], place(c), alignment(c));
          }
        }
      }
      float x[kColumns][words];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (!uses<kStates>(c)) continue;
        if (dtype(c) == DType::kFloat32) {
          __builtin_memcpy(x[c], raw[c], 4 * words);
        } else {
          unpack_halves(x[c], raw[c] + part * words / 2, dtype(c));
        }
      }
#pragma unroll
      for (int i = 0; i < words; ++i) x[kGrad][i] = job.gradient(x[kGrad][i]);
      auto store = [&](int c) {
        if (dtype(c) == DType::kFloat32) {
          uint32_t bits[words];
          __builtin_memcpy(bits, x[c], 4 * words);
          store_words<words>(place(c), bits, alignment(c));
          return;
        }
        pack_halves(raw[c] + part * words / 2, x[c], dtype(c));
        if (part == parts - 1) store_words<lanes / 2>(place(c), raw[c], alignment(c));
      };
      if (job.write_back) store(kGrad);
      forget_memory();
      apply<kStates>(job, x);
      forget_memory();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c != kGrad && uses<kStates>(c)) store(c);
      }
    }
  }
}

// Elements [begin, length) of a chunk one by one, whatever their dtypes and layouts.
template <unsigned kStates, class Rule, class T>
__device__ __forceinline__ void update_elements(const Job<Rule, T>& job, uint32_t begin) {
  const Stream(&streams)[kColumns] = job.streams;
  for (uint32_t i = begin + threadIdx.x; i < job.length; i += kThreads) {
    forget_memory();
    auto at = [&](int c) -> int64_t { return streams[c].layout ? place_of(streams[c].layout, job.offset + i) : i; };
    T x[kColumns][1];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (uses<kStates>(c)) x[c][0] = load_element<T>(streams[c].data(), at(c), streams[c].dtype);
    }
    x[kGrad][0] = job.gradient(x[kGrad][0]);
    if (job.write_back) store_element(streams[kGrad].data(), at(kGrad), streams[kGrad].dtype, x[kGrad][0]);
    forget_memory();
    apply<kStates>(job, x);
    forget_memory();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (c != kGrad && uses<kStates>(c)) store_element(streams[c].data(), at(c), streams[c].dtype, x[c][0]);
    }
  }
}

template <class Rule, class T, unsigned kStates>
__device__ __forceinline__ void update_columns(const Job<Rule, T>& job) {
  uint32_t done = 0;
  if constexpr (sizeof(T) == 4) {
    auto vectors = [&](auto loop, uint32_t lanes) {
      loop(job, job.length / lanes);
      done = job.length / lanes * lanes;
    };
    const unsigned held = job.traits & (kFloat32s | kBFloat16s | kFloat16s | kFloat64s | kNotAligned);
    if (job.traits & (kNotFlat | kFloat64s)) {
    } else if (held == kFloat32s) {
      vectors(update_vectors<kStates, Mix::kFloat32, true, Rule>, kLanes<kStates, Mix::kFloat32>);
    } else if (held == kBFloat16s) {
      vectors(update_vectors<kStates, Mix::kBFloat16, true, Rule>, kLanes<kStates, Mix::kBFloat16>);
    } else if (held == kFloat16s) {
      vectors(update_vectors<kStates, Mix::kFloat16, true, Rule>, kLanes<kStates, Mix::kFloat16>);
    } else if (!(held & kNotAligned)) {
      vectors(update_vectors<kStates, Mix::kAny, true, Rule>, kLanes<kStates, Mix::kAny>);
    } else {
      vectors(update_vectors<kStates, Mix::kAny, false, Rule>, kLanes<kStates, Mix::kAny>);
    }
  }
  update_elements<kStates>(job, done);
}

// The first variant that has the states of variant V.
template <class Rule>
__device__ constexpr unsigned first_like(unsigned variant) {
  unsigned first = 0;
  while (Rule::columns(first) != Rule::columns(variant)) ++first;
  return first;
}

// Calls update_columns for the set of states that it is, of all that the rule's variants have.
template <class Rule, class T, unsigned V = 0>
__device__ __forceinline__ void with_states(unsigned states, const Job<Rule, T>& job) {
  if constexpr (V < Rule::kVariants) {
    if constexpr (first_like<Rule>(V) == V) {
      if (states == Rule::columns(V)) return update_columns<Rule, T, Rule::columns(V)>(job);
    }
    with_states<Rule, T, V + 1>(states, job);
  }
}

template <class Rule, class T>
__device__ __forceinline__ void update_chunk(const UpdateArguments& a, const Row& row, char* grad, int64_t offset,
                                             double multiplier, const RowScalars& scalars, UpdateShared& shared) {
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
    // Scalars are nothing but numbers of one type.
    const int i = threadIdx.x - kWarp;
    reinterpret_cast<T*>(&job.scalars)[i] = T(reinterpret_cast<const double*>(&scalars.values)[i]);
  }
  __syncthreads();
  with_states(states, job);
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const __grid_constant__ UpdateArguments a) {
  UpdateShared& shared = block_shared<UpdateShared>();
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
      update_chunk<Rule, double>(a, row, grad, offset, multiplier, scalars, shared);
    } else {
      update_chunk<Rule, float>(a, row, grad, offset, multiplier, scalars, shared);
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

void load_update() {
#define FUSEDOPT_LOAD_UPDATE(Rule) load_kernel(update_kernel<Rule>);
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_LOAD_UPDATE)
#undef FUSEDOPT_LOAD_UPDATE
}

void update(const Place& place, const UpdateArguments& a, const Row&, bool early) {
  const uint32_t blocks = a.chunk_count ? a.chunk_count : 1;
  switch (a.rule) {
#define FUSEDOPT_LAUNCH_UPDATE(Rule)                      \
  case kRule##Rule:                                       \
    launch(update_kernel<Rule>, blocks, place, early, a); \
    break;
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_LAUNCH_UPDATE)
#undef FUSEDOPT_LAUNCH_UPDATE
    default:
      break;
  }
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
