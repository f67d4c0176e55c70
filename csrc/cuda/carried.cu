// The update pass for rows that a rule's formula is not all of: states in codes or as roots, a master in pieces, an
// average of the weights, rounding by chance; see csrc/storage.h. It is launched in place of the kernel of update.cu
// where an optimizer has any such row, and then works on all of them.
//
// Note [Neighbours]
// A thread takes 4 neighbouring elements of all columns, whatever their forms: what a column is, is looked up in a word
// that holds it for all columns. 16 threads have the 64 elements that share a scale of codes, and find the largest
// magnitude by exchanging theirs, for which all threads of a warp have to be there. A thread's elements share a counter
// of random bits, of which they use half. All this is for the 128 elements of a warp at a time, and for chunks whose
// columns are flat and aligned.
//
// What else there is, the last elements of a row and other layouts, dtypes and numbers of elements, is worked on in a
// loop of its own, in 2 elements per thread, which are accessed and given random bits one by one. It walks on to the
// end of a warp's 64 elements, with zeros beyond the end of the chunk.
#include "forms.h"
#include "update.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {
namespace {

// What a chunk needs beside its Job.
struct Carry {
  char* scales[kMaxStates];  // of the chunk's first block, where a state has codes
  Chance chance;             // `first` is of the chunk where numbers are consecutive
  double weight;             // of the weights in their average
  float float_weight;
  uint32_t step;
  uint32_t forms;   // the DType of each column, in 4 bits
  uint32_t shifts;  // the logarithm of its elements' bytes, in 2 bits
  uint32_t there;   // by column: whether there is one
  bool whole;       // all columns can be accessed in vectors of 4, and random bits too

  __device__ __forceinline__ DType dtype(int c) const { return static_cast<DType>(forms >> 4 * c & 0xfu); }
  __device__ __forceinline__ unsigned shift(int c) const { return shifts >> 2 * c & 3u; }
  __device__ __forceinline__ bool has(int c) const { return there >> c & 1; }
};

struct CarriedShared : UpdateShared {
  Carry carry;
};

// The random bits of a thread's elements in a column.
template <bool kWhole>
__device__ __forceinline__ void find_random(uint32_t (&random)[2], const Carry& carry, uint32_t column,
                                            const Span& span) {
  if (kWhole) {
    const uint64_t number = carry.chance.first + span.first;
    const RandomWords words = random_words(carry.chance, column, carry.step, number >> 3);
    const bool upper = number & 4;
    random[0] = upper ? words.word[2] : words.word[0];
    random[1] = upper ? words.word[3] : words.word[1];
    return;
  }
  random[0] = 0;
#pragma unroll 1
  for (int k = 1; k >= 0; --k) {
    uint64_t number = carry.chance.first;
    number +=
        static_cast<uint64_t>(carry.chance.numbers ? span.place(carry.chance.numbers, k) : span.place(nullptr, k));
    const RandomWords words = random_words(carry.chance, column, carry.step, number >> 3);
    const uint32_t low = number & 2 ? words.word[1] : words.word[0], high = number & 2 ? words.word[3] : words.word[2];
    random[0] = random[0] << 16 | ((number & 4 ? high : low) >> 16 * (number & 1) & 0xffffu);
  }
}

// The elements of a chunk from `begin`, a multiple of what a warp takes at a time: with kWhole as many as are a
// multiple of it, else all.
template <class Rule, class T, unsigned kStates, bool kWhole>
__device__ __forceinline__ void update_neighbours(const Job<Rule, T>& job, const Carry& carry, uint32_t begin) {
  constexpr int kCount = kWhole ? 4 : 2, kWords = kCount * static_cast<int>(sizeof(T)) / 4;
  constexpr uint32_t kTogether = kWarp * kCount;
  const Stream(&streams)[kColumns] = job.streams;
  auto stop = [&] { return (kWhole ? job.length : job.length + kTogether - 1) / kTogether * kTogether; };
  for (uint32_t first = begin + threadIdx.x * kCount; first < stop(); first += kThreads * kCount) {
    forget_memory();
    const Span span = {job.offset, first, kWhole ? kCount : static_cast<int>(job.length - first)};
    auto scale_at = [&](int c) {
      return reinterpret_cast<uint16_t*>(in_global_memory(carry.scales[c - kState])) + first / kCodeBlock;
    };
    uint32_t raw[kColumns][kWords] = {};  // (without zeros ptxas holds on to what was there before)
    auto load = [&](int c) {
      if constexpr (kWhole) {
        load_whole(raw[c], streams[c].data(), carry.shift(c), first);
      } else {
        load_single<T>(raw[c], streams[c].data(), streams[c].layout, carry.dtype(c), span);
      }
    };
    // (What is stored is in words of its own: those that were loaded would be held until then.)
    auto store = [&](int c, uint32_t (&bits)[kWords]) {
      if constexpr (kWhole) {
        store_whole(streams[c].data(), bits, carry.shift(c), first);
      } else {
        store_single<T>(streams[c].data(), bits, streams[c].layout, carry.dtype(c), span);
      }
    };
    T x[kColumns][kCount];
    auto decode = [&](int c) {
      if (c >= kState) return decode_state(x[c], raw[c], carry.dtype(c));
      decode_plain(x[c], raw[c], carry.dtype(c));
    };
    // Whole vectors are all loaded before any is looked at. Single elements would be too many registers.
#pragma unroll
    for (int c = kMaster - 1; c >= 0; --c) {
      if (!uses<kStates>(c)) continue;
      load(c);
      if (c >= kState && is_coded(carry.dtype(c)) && span.left > 0) raw[c][kWords - 1] = *scale_at(c);
      if (!kWhole) decode(c);
    }
    if (sizeof(T) == 4 && carry.has(kMaster)) load(kMaster);
    if (kWhole && carry.has(kAverage)) load(kAverage);
#pragma unroll
    for (int c = 0; c < kMaster; ++c) {
      if (kWhole && uses<kStates>(c)) decode(c);
    }
    if constexpr (sizeof(T) == 4) {
      if (carry.has(kMaster)) {
        join_master(x[kParam], raw[kParam], raw[kMaster], carry.dtype(kMaster), carry.dtype(kParam));
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[kGrad][k] = job.gradient(x[kGrad][k]);
    if (job.write_back) {
      uint32_t bits[kWords] = {};
      encode_plain(bits, x[kGrad], carry.dtype(kGrad));
      store(kGrad, bits);
    }
    forget_memory();
    apply<kStates>(job, x);
    forget_memory();

#pragma unroll
    for (int c = kState; c < kMaster; ++c) {
      if (!uses<kStates>(c)) continue;
      const DType dtype = carry.dtype(c);
      const bool by_chance = rounds_by_chance(dtype, carry.chance.rounds);
      uint32_t bits[kWords] = {};
      uint32_t random[2] = {0x80008000u, 0x80008000u};
      if (by_chance) find_random<kWhole>(random, carry, static_cast<uint32_t>(c - kState + 1), span);
      if (is_coded(dtype)) {
        if (dtype == DType::kSigned8) {
          encode_codes<SignedCode>(bits, x[c], random, span.left);
        } else {
          encode_codes<UnsignedCode>(bits, x[c], random, span.left);
        }
        if (first % kCodeBlock == 0 && span.left > 0) *scale_at(c) = static_cast<uint16_t>(bits[kWords - 1]);
      } else if (dtype == DType::kRoot16) {
        encode_root16(bits, x[c], by_chance, random);
      } else if (by_chance) {
        encode_by_chance(bits, x[c], dtype, random);
      } else {
        encode_plain(bits, x[c], dtype);
      }
      store(c, bits);
    }

    bool mastered = false;
    uint32_t param[kWords] = {};
    if constexpr (sizeof(T) == 4) {
      if (carry.has(kMaster)) {
        mastered = true;
        uint32_t master[kWords] = {};
        const DType dtype = carry.dtype(kMaster);
        if (dtype == DType::kFloat32) {
          encode_plain(param, x[kParam], carry.dtype(kParam));
          encode_plain(master, x[kParam], dtype);
        } else {
          uint32_t random[2];
          const bool by_chance = carry.chance.rounds && dtype == DType::kLow8;
          if (by_chance) find_random<kWhole>(random, carry, 0, span);
          split_master(param, master, x[kParam], dtype, by_chance, random);
        }
        store(kMaster, master);
      }
    }
    if (!mastered) {
      const DType dtype = carry.dtype(kParam);
      if (rounds_by_chance(dtype, carry.chance.rounds)) {
        uint32_t random[2];
        find_random<kWhole>(random, carry, 0, span);
        encode_by_chance(param, x[kParam], dtype, random);
      } else {
        encode_plain(param, x[kParam], dtype);
      }
      if (carry.has(kAverage)) decode_plain(x[kParam], param, dtype);  // as it was rounded
    }
    store(kParam, param);
    if (carry.has(kAverage)) {
      const T weight = sizeof(T) == 4 ? T(carry.float_weight) : T(carry.weight);
      if (!kWhole) load(kAverage);
      T average[kCount];
      decode_plain(average, raw[kAverage], carry.dtype(kAverage));
#pragma unroll
      for (int k = 0; k < kCount; ++k) average[k] = averaged(average[k], x[kParam][k], weight);
      uint32_t bits[kWords] = {};
      encode_plain(bits, average, carry.dtype(kAverage));
      store(kAverage, bits);
    }
  }
}

// Columns in any form; see update_block().
struct AnyColumns {
  using Shared = CarriedShared;

  static __device__ __forceinline__ void prepare(const UpdateArguments& a, const Row& row, const char* grad,
                                                 int64_t offset, unsigned states, const RowScalars& scalars,
                                                 Shared& shared) {
    const bool doubles = row.dtype[kParam] == DType::kFloat64;
    const bool averages = doubles ? scalars.average_weight != 0 : static_cast<float>(scalars.average_weight) != 0;
    const int c = threadIdx.x % kWarp;
    unsigned form = 0, shift = 0, there = 0, single = 0, draws = row.by_chance;
    if (c < kColumns) {
      const DType dtype = row.dtype[c];
      const int64_t size = element_size(dtype);
      const char* data = c == kGrad ? grad : static_cast<const char*>(row.data[c]);
      const bool rule = (0b11 | states << kState) >> c & 1;
      const bool has = rule || (data && (c == kMaster || (c == kAverage && averages)));
      form = static_cast<unsigned>(dtype) << 4 * c;
      shift = (size == 1 ? 0u : size == 2 ? 1u : 2u) << 2 * c;
      there = has ? 1u << c : 0u;
      single = has && (row.layout[c] >= 0 || size == 8 || alignment_of(data + offset * size) < 4 * size);
      if (rule && dtype == DType::kUnsigned8) draws = 1;
      if (c >= kState && c < kMaster) {
        shared.carry.scales[c - kState] =
            static_cast<char*>(row.data[c]) + scales_at(row.numel) + offset / kCodeBlock * 2;
      }
    }
    form = __reduce_or_sync(0xffffffffu, form);
    shift = __reduce_or_sync(0xffffffffu, shift);
    there = __reduce_or_sync(0xffffffffu, there);
    single = __reduce_or_sync(0xffffffffu, single);
    draws = __reduce_or_sync(0xffffffffu, draws);
    if (c != 0) return;
    const Layout* numbers = row.numbers < 0 ? nullptr : a.tables.layouts + row.numbers;
    const uint64_t first = row.first_number + (numbers ? 0 : static_cast<uint64_t>(offset));
    shared.carry.chance = {a.seed, first, numbers, row.stream, row.by_chance};
    shared.carry.weight = scalars.average_weight;
    shared.carry.float_weight = static_cast<float>(scalars.average_weight);
    shared.carry.step = scalars.step;
    shared.carry.forms = form, shared.carry.shifts = shift, shared.carry.there = there;
    shared.carry.whole = !single && !doubles && (!draws || (!numbers && first % 4 == 0));
  }

  template <class Rule, class T, unsigned kStates>
  static __device__ __forceinline__ void update(const Job<Rule, T>& job, const Shared& shared) {
    const Carry& carry = shared.carry;
    uint32_t done = 0;
    if constexpr (sizeof(T) == 4) {
      if (carry.whole) {
        update_neighbours<Rule, T, kStates, true>(job, carry, 0);
        done = job.length / (4 * kWarp) * (4 * kWarp);
      }
    }
    update_neighbours<Rule, T, kStates, false>(job, carry, done);
  }
};

template <class Rule>
__global__ void __launch_bounds__(kThreads, 4) carried_kernel(const __grid_constant__ UpdateArguments a) {
  update_block<AnyColumns, Rule>(a);
}

}  // namespace

void load_carried() {
#define FUSEDOPT_LOAD_CARRIED(Rule) load_kernel(carried_kernel<Rule>);
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_LOAD_CARRIED)
#undef FUSEDOPT_LOAD_CARRIED
}

void update_carried(const Place& place, const UpdateArguments& a, bool early) {
  const uint32_t blocks = a.chunk_count ? a.chunk_count : 1;
  switch (a.rule) {
#define FUSEDOPT_LAUNCH_CARRIED(Rule)                      \
  case kRule##Rule:                                        \
    launch(carried_kernel<Rule>, blocks, place, early, a); \
    break;
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_LAUNCH_CARRIED)
#undef FUSEDOPT_LAUNCH_CARRIED
    default:
      break;
  }
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
