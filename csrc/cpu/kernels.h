// The CPU kernels of one instruction set, behind a table of functions.
#pragma once
#include "../export.h"
#include "../rules/rules.h"
#include "../tables.h"

namespace fusedopt::cpu {

// Accumulates elements [offset, offset + length) of a raw gradient: the sum of |g|^p (the maximum for the inf norm) in
// *partial. Returns true when one of them is NaN or infinite.
using StatisticsFn = bool (*)(const Column& grad, const StatisticsSettings&, int64_t offset, int64_t length,
                              double* partial);

// Applies the rule to elements [offset, offset + length) of a row.
using UpdateFn = void (*)(const TensorRow&, const RowScalars&, const UpdateSettings&, int64_t offset, int64_t length);

struct Kernels {
  const char* isa;
  StatisticsFn statistics;
  UpdateFn update[kRuleCount];
};

// Null where the build lacks the instruction set. Whether the processor has it is for the caller to ask: these
// functions are compiled with it too.
FUSEDOPT_EXPORT const Kernels* kernels_baseline();
FUSEDOPT_EXPORT const Kernels* kernels_avx2();
FUSEDOPT_EXPORT const Kernels* kernels_avx512();

}  // namespace fusedopt::cpu
