// The plain tables that kernels read. No torch, no STL: shared by every CPU translation unit and by device code.
#pragma once
#include <stdint.h>

#include "rules/common.h"

namespace fusedopt {

// How the elements of a column lie in memory: torch's dtypes first, then forms of our own, see csrc/storage.h.
enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kRoot16,     // the square root, as a float16
  kSigned8,    // codes in blocks that share a scale
  kUnsigned8,  // the same of numbers that are never negative
  kLow16,      // what makes a bfloat16 parameter a float32, in 16 bits
  kLow8,       // or in 8
};

FUSEDOPT_HD int64_t element_size(DType dtype) {
  if (dtype == DType::kFloat64) return 8;
  if (dtype == DType::kFloat32) return 4;
  return dtype == DType::kSigned8 || dtype == DType::kUnsigned8 || dtype == DType::kLow8 ? 1 : 2;
}

FUSEDOPT_HD bool is_coded(DType dtype) { return dtype == DType::kSigned8 || dtype == DType::kUnsigned8; }

// A coded column is one run of bytes in canonical order: a code for each element, filled up to a multiple of 16, and
// the blocks' scales, a bfloat16 each.
constexpr int64_t kCodeBlock = 64;

FUSEDOPT_HD int64_t scales_at(int64_t numel) { return (numel + 15) / 16 * 16; }
FUSEDOPT_HD int64_t coded_bytes(int64_t numel) {
  return scales_at(numel) + 2 * ((numel + kCodeBlock - 1) / kCodeBlock);
}

// Note [Canonical order]
// The elements of a parameter are numbered along its dimensions sorted by the parameter's own strides, largest first.
// For a dense parameter in any memory format that is its memory order. A column (gradient, state, or the parameter
// itself) whose strides agree is *flat*: element i lies at data + i. One whose strides do not agree carries a Layout
// in that dimension order, and kernels gather and scatter through a small block buffer. So any stride pattern works,
// without a gradient-sized copy.
constexpr int kMaxDims = 16;

struct Layout {
  int dims;  // outermost first, neighbours merged where they allow it
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];  // in elements
};

struct Column {
  void* data;
  const Layout* layout;  // null when flat
  DType dtype;
};

// Whose random bits round a row; see Note [Random bits] in csrc/storage.h.
struct Chance {
  uint64_t seed;
  uint64_t first;         // the number of the row's first element
  const Layout* numbers;  // of the others, from `first`; null where they are consecutive
  uint32_t stream;        // the parameter's number in its optimizer
  bool rounds;            // whether anything is rounded by chance
};

// What a row has beside what its rule knows of.
struct Carried {
  Column master;   // float32, or the rest of the parameter's bits; without data where there is none
  Column average;  // of the weights; likewise
  Chance chance;
};

// One parameter. `grad.data` is null while the parameter takes no part in the step.
struct TensorRow {
  Column param, grad, state[kMaxStates];
  const Carried* carried;  // null where there is nothing of it
  void* step;              // 0-dim count of steps taken, or null for a rule that keeps none here
  int64_t numel;
  uint32_t group;  // row of the group table
  DType step_dtype;
};

// A run of consecutive elements of one row.
struct Chunk {
  uint32_t row;
  uint32_t length;
  int64_t offset;
};

enum class NormKind : uint8_t { kNone, kOne, kTwo, kInf, kP };

struct StatisticsSettings {
  NormKind kind;
  double p;  // order, for kP
};

// What a statistics pass finds: of a chunk, of a domain, of one of several devices or processes, and of all of them.
// The total is the sum of the powers of magnitudes, or the largest magnitude; zero adds nothing to either.
FUSEDOPT_HD double add_totals(NormKind kind, double a, double b) {
  return kind == NormKind::kInf ? nan_max(a, b) : a + b;
}

// The norm that a finished total makes.
FUSEDOPT_HD double norm_of(const StatisticsSettings& settings, double total) {
  if (settings.kind == NormKind::kTwo) return square_root(total);
  return settings.kind == NormKind::kP ? power(total, 1 / settings.p) : total;
}

// The average of the weights that a step leaves, `average + weight * (value - average)`, as MMEngine's: until step
// number `begin` and at the first after it it is the weights, and from then on it is updated at every `interval`-th.
struct AverageSettings {
  double momentum = 0;  // the weight, or the smallest, of the new value
  double gamma = 0;     // with it, after so many steps the weight is 1/2; 0 without
  int64_t begin = 0, interval = 1;
};

// The weight of the new value at step number `step`, from 1; 0 leaves the average alone.
FUSEDOPT_HD double average_weight(const AverageSettings& settings, double step) {
  const int64_t updates = static_cast<int64_t>(step) - 1 - settings.begin;
  if (updates <= 0) return 1;
  if (updates % settings.interval != 0) return 0;
  const double annealed = settings.gamma > 0 ? settings.gamma / (settings.gamma + static_cast<double>(updates)) : 0;
  return annealed > settings.momentum ? annealed : settings.momentum;
}

// As torch.lerp, but that a weight of 1 gives the value itself whatever the average was.
template <class T, bool kSmall>
FUSEDOPT_HD T averaged(T average, T value, T weight) {
  return kSmall ? average + weight * (value - average) : value - (value - average) * (T(1) - weight);
}
template <class T>
FUSEDOPT_HD T averaged(T average, T value, T weight) {
  if (weight == T(1)) return value;
  return weight < T(0.5) ? averaged<T, true>(average, value, weight) : averaged<T, false>(average, value, weight);
}

struct UpdateSettings {
  double multiplier;  // inverse scale times clip coefficient
  double clip_value;  // infinite when gradients are not clipped by value
  bool write_back;    // store the unscaled, clipped gradient
};

}  // namespace fusedopt
