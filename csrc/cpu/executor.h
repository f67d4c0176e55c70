// Runs the two passes over a flat chunk list with torch's intra-op threads.
#pragma once
#include <string>
#include <vector>

#include "../tables.h"
#include "kernels.h"

namespace fusedopt::cpu {

// A function of sizes alone: partials belong to chunks, so this fixes the order in which a norm is added up.
constexpr int64_t kChunkElements = 16384;

// What the passes work on; the vectors are owned by the plan.
struct Work {
  const std::vector<TensorRow>& rows;
  const std::vector<Chunk>& chunks;
  int64_t elements;  // of the rows that take part
  bool in_order;     // rows share memory: one thread, first row first
};

// The constants of each row that takes part.
struct Scalars {
  const std::vector<RowScalars>& distinct;
  const std::vector<uint32_t>& of_row;  // index of a row's

  const RowScalars& operator[](uint32_t row) const { return distinct[of_row[row]]; }
};

// Instruction sets of this build that this processor has, best last.
std::vector<std::string> available_isas();
// The one in use: the best, or the one that FUSEDOPT_CPU_ISA names.
std::string isa_in_use();
// Throws std::invalid_argument when `name` is not available.
void use_isa(const std::string& name);

// Leaves the total of each chunk in `partials`, and returns whether a gradient is not finite.
bool statistics(const Work& work, const StatisticsSettings& settings, std::vector<double>& partials);
void update(const Work& work, RuleId rule, const Scalars& scalars, const UpdateSettings& settings);

}  // namespace fusedopt::cpu
