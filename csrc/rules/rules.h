// Every rule, in one list. CONTRIBUTING.md says how to add one.
#pragma once
#include <stdint.h>

#include "adam.h"
#include "sgd.h"

#define FUSEDOPT_FOR_EACH_RULE(X) X(Sgd) X(Adam)

namespace fusedopt {

enum RuleId {
#define FUSEDOPT_RULE_ID(Rule) kRule##Rule,
  FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_RULE_ID)
#undef FUSEDOPT_RULE_ID
      kRuleCount
};

template <int kCount>
constexpr bool fits_hyper_slots(const HyperKey (&keys)[kCount]) {
  for (const HyperKey& key : keys) {
    if (key.slot + (key.arity > 1 ? key.arity : 1) > kMaxHyper) return false;
  }
  return true;
}

// Room for any rule's Scalars<double>.
struct alignas(8) ScalarsStorage {
  unsigned char bytes[80];
};

// The rule's constants of one row in one step, and what else depends on which step it is.
struct RowScalars {
  ScalarsStorage values;
  double average_weight;  // of the new value in the average of the weights
  uint32_t variant;
  uint32_t step;  // its number, from 1, as it goes into random bits
};

#define FUSEDOPT_CHECK_RULE(Rule)                                         \
  static_assert(sizeof(Rule::Scalars<double>) <= sizeof(ScalarsStorage)); \
  static_assert(fits_hyper_slots(Rule::kKeys));                           \
  static_assert(sizeof(Rule::kStates) / sizeof(Rule::kStates[0]) <= kMaxStates);
FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_CHECK_RULE)
#undef FUSEDOPT_CHECK_RULE

}  // namespace fusedopt
