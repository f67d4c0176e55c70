// The plain tables that kernels read. No torch, no STL: shared by every CPU translation unit and by device code.
#pragma once
#include <stdint.h>

#include "rules/common.h"

namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

FUSEDOPT_HD int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
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

// One parameter. `grad.data` is null while the parameter takes no part in the step.
struct TensorRow {
  Column param, grad, state[kMaxStates];
  void* step;  // 0-dim count of steps taken, or null for a rule that keeps none here
  int64_t numel;
  uint32_t group;    // row of the group table
  uint32_t scalars;  // row of this step's scalars
  uint32_t variant;  // the rule's instantiation
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

struct UpdateSettings {
  double multiplier;  // inverse scale times clip coefficient
  double clip_value;  // infinite when gradients are not clipped by value
  bool write_back;    // store the unscaled, clipped gradient
};

}  // namespace fusedopt
