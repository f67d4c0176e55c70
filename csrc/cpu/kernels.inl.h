// The kernels, written once and compiled per instruction set by kernels_<isa>.cpp, which defines
//   FUSEDOPT_ISA_NAME   the name shown to users
//   FUSEDOPT_LANES      doubles in one vector of the norm: 4, or 2 without AVX (8 is no faster: it is memory-bound)
//   FUSEDOPT_HAS_F16C   where the fp16 conversion instructions exist
// Everything is in an anonymous namespace and no torch or STL header is included: an inline function merged by the
// linker across these translation units could run an instruction the processor lacks.
//
// Note [Same bits everywhere]
// The build forbids contraction into fused multiply-adds and reassociation, sums run over lanes that are spelled out
// below, and chunks depend on sizes alone. So results are the same bits for any number of threads, and for any of
// these instruction sets too.
#include <stddef.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../storage.h"
#include "kernels.h"

namespace fusedopt::cpu {
namespace {

// Elements of a row worked on at a time where not all columns are flat and of the type that is calculated in; the
// blocks of all columns together stay in the first-level cache.
constexpr int64_t kBlock = 512;

#include "convert.h"
#include "random.h"
#include "forms.h"
#include "statistics.h"

// Note [Columns of a loop]
// Converting a block at a time, before and after the loop that applies a rule, costs as much again as the rule: that
// loop waits for the divider, while the processor has nothing else to do. So it reads and writes the commonest forms
// itself: bfloat16, and 8-bit codes as far as they can be read. What else there is goes through blocks of T. These are
// forms of all states at once, since each makes a loop of its own: not one for each combination.
template <class T>
struct Numbers {
  T* at;
  FUSEDOPT_HD T get(int64_t i) const { return at[i]; }
  FUSEDOPT_HD void put(int64_t i, T value) const { at[i] = value; }
};

struct BFloat16s {
  uint16_t* at;
  FUSEDOPT_HD float get(int64_t i) const { return bf16_to_float(at[i]); }
  FUSEDOPT_HD void put(int64_t i, float value) const { at[i] = float_to_bf16(value); }
};

// Read where they are, and written to a block, to be rounded by chance or coded from there.
struct FromBFloat16s {
  const uint16_t* at;
  float* block;
  FUSEDOPT_HD float get(int64_t i) const { return bf16_to_float(at[i]); }
  FUSEDOPT_HD void put(int64_t i, float value) const { block[i] = value; }
};

template <bool kUnsigned>
struct FromCodes {
  const uint8_t* at;
  float scale;
  float* block;
  FUSEDOPT_HD float get(int64_t i) const {
    return kUnsigned ? decode_unsigned(at[i], scale) : decode_signed(at[i], scale);
  }
  FUSEDOPT_HD void put(int64_t i, float value) const { block[i] = value; }
};

// The inner loop: one rule over flat columns.
template <class Rule, unsigned V, class T, class Count, class P, class G, class S0, class S1, class S2>
FUSEDOPT_HD void update_run(const typename Rule::template Scalars<T>& s, T multiplier, T bound, Count n, P p, G g,
                            S0 s0, S1 s1, S2 s2) {
  constexpr unsigned columns = Rule::columns(V);
  const int64_t count = n;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T param = p.get(i), x0{}, x1{}, x2{};
    if constexpr (columns & 1) x0 = s0.get(i);
    if constexpr (columns & 2) x1 = s1.get(i);
    if constexpr (columns & 4) x2 = s2.get(i);
    Rule::template update<V>(s, clamp(g.get(i) * multiplier, bound), param, x0, x1, x2);
    p.put(i, param);
    if constexpr (columns & 1) s0.put(i, x0);
    if constexpr (columns & 2) s1.put(i, x1);
    if constexpr (columns & 4) s2.put(i, x2);
  }
}

// The constants of a row, in the type that is calculated in.
template <class Rule, class T>
typename Rule::template Scalars<T> scalars_of(const RowScalars& constants) {
  typename Rule::template Scalars<double> exact;
  __builtin_memcpy(&exact, &constants.values, sizeof(exact));
  return exact.template as<T>();
}

// One chunk of a row.
template <class Rule, unsigned V, class T>
struct Chunked {
  static constexpr unsigned kColumns = Rule::columns(V);
  static constexpr DType kNative = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
  // Whether the loop reads and writes other forms itself: a rule without states has little to wait for.
  static constexpr bool kForms = sizeof(T) == 4 && kColumns != 0;

  const TensorRow& row;
  const UpdateSettings& settings;
  typename Rule::template Scalars<T> scalars;
  T multiplier, bound, weight;
  Rounding rounding;
  Window<T> param, grad, state[kMaxStates];
  Mastered mastered;
  bool has_master = false;
  DType states = kNative;  // the form of all states, where the loop reads it, else kNative: then they are blocks of T

  static bool has(int c) { return kColumns >> c & 1; }
  static bool plain(const Column& column) { return !column.layout && column.dtype == kNative; }

  // All of it in place.
  static bool is_direct(const TensorRow& row, const UpdateSettings& settings) {
    bool direct = plain(row.param) && plain(row.grad) && !settings.write_back && !row.carried;
    for (int c = 0; c < kMaxStates; ++c) direct &= !has(c) || plain(row.state[c]);
    return direct;
  }

  Chunked(const TensorRow& row, const RowScalars& constants, const UpdateSettings& settings)
      : row(row), settings(settings), multiplier(T(settings.multiplier)), bound(T(settings.clip_value)) {
    scalars = scalars_of<Rule, T>(constants);
    const Carried* carried = row.carried;
    rounding.chance = carried ? &carried->chance : nullptr;
    rounding.step = constants.step;
    weight = carried && carried->average.data ? T(constants.average_weight) : T(0);
    if constexpr (sizeof(T) == 4) has_master = carried && carried->master.data;
    if (has_master) mastered.open(row);
    param.open(row, row.param, kNative);
    grad.open(row, row.grad, kNative);
    for (int c = 0; c < kMaxStates; ++c) {
      if (has(c)) state[c].open(row, row.state[c], kNative);
    }
    if constexpr (kForms) states = form_of_states();
  }

  DType form_of_states() const {
    bool halves = true, codes = true;
    for (int c = 0; c < kMaxStates; ++c) {
      if (!has(c)) continue;
      halves &= !row.state[c].layout && row.state[c].dtype == DType::kBFloat16;
      codes &= is_coded(row.state[c].dtype);
    }
    return halves ? DType::kBFloat16 : codes ? DType::kSigned8 : kNative;
  }

  // Whether the loop reads and writes all there is itself, so that it need not stop after a block.
  bool needs_no_block() const {
    if (states != DType::kBFloat16 || rounding.asked() || has_master || weight != T(0)) return false;
    auto is_half = [](const Column& column) { return !column.layout && column.dtype == DType::kBFloat16; };
    if (settings.write_back) return false;
    return is_half(row.grad) ? param.direct || is_half(row.param) : param.direct && grad.direct;
  }

  template <class P, class G, class Count>
  FUSEDOPT_HD void apply(int64_t at, Count n, P p, G g) {
    // What has been written back must not be unscaled twice; clamping twice is the same as once.
    const T by = settings.write_back ? T(1) : multiplier;
    if constexpr (kForms) {
      auto halves = [&](int c) { return static_cast<uint16_t*>(row.state[c].data) + at; };
      if (states == DType::kBFloat16 && !rounding.asked()) {
        auto of = [&](int c) { return BFloat16s{has(c) ? halves(c) : nullptr}; };
        return update_run<Rule, V, T>(scalars, by, bound, n, p, g, of(0), of(1), of(2));
      }
      if (states == DType::kBFloat16) {
        auto of = [&](int c) { return FromBFloat16s{has(c) ? halves(c) : nullptr, state[c].block}; };
        return update_run<Rule, V, T>(scalars, by, bound, n, p, g, of(0), of(1), of(2));
      }
      if (states == DType::kSigned8) return apply_to_codes(at, n, p, g, by);
    }
    auto of = [&](int c) { return Numbers<T>{has(c) ? state[c].load_at(at, n) : nullptr}; };
    update_run<Rule, V, T>(scalars, by, bound, n, p, g, of(0), of(1), of(2));
  }

  template <class P, class G>
  FUSEDOPT_HD void apply_to_codes(int64_t at, int64_t n, P p, G g, T by) {
    auto run = [&](int64_t begin, auto count) __attribute__((always_inline)) {
      auto codes = [&](int c) { return static_cast<const uint8_t*>(row.state[c].data) + at + begin; };
      auto of = [&](auto is_unsigned, int c) {
        if (!has(c)) return FromCodes<is_unsigned.value>{};
        const float scale = bf16_to_float(*scale_at(row.state[c], row.numel, at + begin));
        return FromCodes<is_unsigned.value>{codes(c), scale, state[c].block + begin};
      };
      auto from = [&](auto column) __attribute__((always_inline)) {
        column.at += begin;
        return column;
      };
      update_run<Rule, V, T>(scalars, by, bound, count, from(p), from(g), of(Truth<(Rule::kSquares & 1) != 0>(), 0),
                             of(Truth<(Rule::kSquares & 2) != 0>(), 1), of(Truth<(Rule::kSquares & 4) != 0>(), 2));
    };
    for_each_code_block(n, run);
  }

  // Works on `n` elements, which `next` more will follow.
  void step(int64_t at, int64_t n, int64_t next) {
    const bool halves = !row.grad.layout && row.grad.dtype == DType::kBFloat16 && !settings.write_back;
    auto gradients = [&] { return BFloat16s{static_cast<uint16_t*>(row.grad.data) + at}; };
    bool written = false;  // the parameter, by the loop
    T* p = nullptr;
    if constexpr (kForms) {
      if (halves && !has_master && states == DType::kBFloat16 && !rounding.asked() && !row.param.layout &&
          row.param.dtype == DType::kBFloat16) {
        apply(at, n, BFloat16s{static_cast<uint16_t*>(row.param.data) + at}, gradients());
        written = true;
      }
    }
    if (!written) {
      if constexpr (sizeof(T) == 4) p = has_master ? mastered.load_at(at, n) : param.load_at(at, n);
      if constexpr (sizeof(T) == 8) p = param.load_at(at, n);
      bool applied = false;
      if constexpr (kForms) {
        if (halves) {
          apply(at, n, Numbers<T>{p}, gradients());
          applied = true;
        }
      }
      if (!applied) {
        T* g = grad.load_at(at, n);
        if (settings.write_back) {
          for (int64_t i = 0; i < n; ++i) g[i] = clamp(g[i] * multiplier, bound);
          if (!grad.direct) store(row.grad, at, n, g);
        }
        apply(at, n, Numbers<T>{p}, Numbers<T>{g});
      }
    }
    for (int c = 0; c < kMaxStates; ++c) {
      if (has(c) && !(states == DType::kBFloat16 && !rounding.asked())) {
        // Rounding and coding ask nothing of the memory, which meanwhile gets the next block.
        prefetch(c == 0 ? row.grad : c == 1 ? row.param : row.state[c], at + n, next);
        state[c].store_at(at, n, rounding, uint32_t(1 + c));
      }
    }
    if constexpr (sizeof(T) == 4) {
      if (has_master) mastered.store_at(at, n, rounding);
    }
    if (!has_master && !written) param.store_at(at, n, rounding, 0);
    if (weight != T(0)) {
      prefetch(row.carried->average, at + n, next);
      if (!has_master && !param.direct) p = param.load_at(at, n);  // as it was rounded
      average_block(row.carried->average, at, n, p, weight);
    }
  }
};

template <class Rule, unsigned V, class T>
void update_chunk(const TensorRow& row, const RowScalars& constants, const UpdateSettings& settings, int64_t offset,
                  int64_t length) {
  using Chunk = Chunked<Rule, V, T>;
  if (Chunk::is_direct(row, settings)) {
    auto at = [&](const Column& column) { return Numbers<T>{static_cast<T*>(column.data) + offset}; };
    auto state = [&](int c) { return Chunk::has(c) ? at(row.state[c]) : Numbers<T>{nullptr}; };
    return update_run<Rule, V, T>(scalars_of<Rule, T>(constants), T(settings.multiplier), T(settings.clip_value),
                                  length, at(row.param), at(row.grad), state(0), state(1), state(2));
  }
  Chunk chunk(row, constants, settings);
  if (chunk.needs_no_block()) return chunk.step(offset, length, 0);
  for (int64_t done = 0; done < length; done += kBlock) {
    const int64_t left = length - done, n = left < kBlock ? left : kBlock;
    chunk.step(offset + done, n, left - n < kBlock ? left - n : kBlock);
  }
}

template <class Rule, unsigned V = 0>
void update_variant(const TensorRow& row, const RowScalars& scalars, const UpdateSettings& settings, int64_t offset,
                    int64_t length) {
  if constexpr (V < Rule::kVariants) {
    if (scalars.variant != V) return update_variant<Rule, V + 1>(row, scalars, settings, offset, length);
    if (row.param.dtype == DType::kFloat64) {
      update_chunk<Rule, V, double>(row, scalars, settings, offset, length);
    } else {
      update_chunk<Rule, V, float>(row, scalars, settings, offset, length);
    }
  }
}

constexpr Kernels kTable = {FUSEDOPT_ISA_NAME,
                            statistics,
                            {
#define FUSEDOPT_UPDATE_ENTRY(Rule) update_variant<Rule>,
                                FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_UPDATE_ENTRY)
#undef FUSEDOPT_UPDATE_ENTRY
                            }};

}  // namespace
}  // namespace fusedopt::cpu
