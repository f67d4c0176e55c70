#include "rule_interface.h"

#include <cstring>
#include <iterator>
#include <stdexcept>

namespace fusedopt {
namespace {

template <class Rule>
RuleInterface interface_of(RuleId id) {
  return {id,
          Rule::kName,
          Rule::kKeys,
          static_cast<int>(std::size(Rule::kKeys)),
          Rule::kStates,
          static_cast<int>(std::size(Rule::kStates)),
          Rule::kSquares,
          [](const double* hyper, double step) { return Rule::variant(hyper, step); },
          [](unsigned variant) { return Rule::columns(variant); },
          [](const double* hyper, double step, ScalarsStorage* out) {
            auto scalars = Rule::derive(hyper, step);
            std::memcpy(out, &scalars, sizeof(scalars));
          }};
}

const RuleInterface kRules[] = {
#define FUSEDOPT_RULE_INTERFACE(Rule) interface_of<Rule>(kRule##Rule),
    FUSEDOPT_FOR_EACH_RULE(FUSEDOPT_RULE_INTERFACE)
#undef FUSEDOPT_RULE_INTERFACE
};

}  // namespace

const RuleInterface& rule_named(const std::string& name) {
  for (const RuleInterface& rule : kRules) {
    if (name == rule.name) return rule;
  }
  throw std::invalid_argument("no kernels for a rule called '" + name + "'");
}

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const RuleInterface& rule : kRules) names.emplace_back(rule.name);
  return names;
}

}  // namespace fusedopt
