// The update pass: unscaling, clipping, weight decay and the rule, one block per chunk.
//
// Here for columns of plain numbers; see carried.cu for the others.
#include "update.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {
namespace {

// The words of one access: fewer where five columns have to be held at once.
template <unsigned kStates>
constexpr int kWords = kStates == 0b111 ? 2 : 4;

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

// Columns of plain numbers; see update_block().
struct PlainColumns {
  using Shared = UpdateShared;
  static __device__ __forceinline__ void prepare(const UpdateArguments&, const Row&, const char*, int64_t, unsigned,
                                                 const RowScalars&, Shared&) {}

  template <class Rule, class T, unsigned kStates>
  static __device__ __forceinline__ void update(const Job<Rule, T>& job, const Shared&) {
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
};

template <class Rule>
__global__ void __launch_bounds__(kThreads, 4) update_kernel(const __grid_constant__ UpdateArguments a) {
  update_block<PlainColumns, Rule>(a);
}

}  // namespace

void load_update() {
#define FUSEDOPT_LOAD_UPDATE(Rule) load_kernel(update_kernel<Rule>);
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_LOAD_UPDATE)
#undef FUSEDOPT_LOAD_UPDATE
}

void update(const Place& place, const UpdateArguments& a, const Row&, bool early) {
  if (a.carries) return update_carried(place, a, early);
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
