// What a plan works on in one step on devices.
#pragma once
#include <vector>

#include "../step.h"
#include "tables.h"

namespace fusedopt::device {

// Stands for the device of a row that no kernel can work on, and that takes no part.
constexpr int kNowhere = -1;

// Owned by the plan.
struct Work {
  const std::vector<TensorRow>& rows;
  const std::vector<int>& devices;       // of each row, or kNowhere
  const std::vector<uint32_t>& domains;  // of each row, see Note [A step in two halves]
  const std::vector<const HyperValues*>& groups;
  RuleId rule;
  AverageSettings average;
  uint64_t seed;    // of random bits
  bool any_double;  // a parameter is in float64
  bool overlaps;    // rows share memory: the update takes one after the other
  bool capturing;   // the current stream of a device is capturing a graph
};

}  // namespace fusedopt::device
