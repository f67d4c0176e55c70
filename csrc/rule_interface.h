// The rules behind plain functions, for host code that is the same for all of them.
#pragma once
#include <string>
#include <vector>

#include "rules/rules.h"

namespace fusedopt {

struct RuleInterface {
  RuleId id;
  const char* name;
  const HyperKey* keys;
  int key_count;
  const char* const* states;
  int state_count;
  unsigned squares;  // the states that are means of squares
  unsigned (*variant)(const double* hyper, double step);
  unsigned (*columns)(unsigned variant);
  void (*derive)(const double* hyper, double step, ScalarsStorage* out);
};

// Throws std::invalid_argument for an unknown name.
const RuleInterface& rule_named(const std::string& name);
std::vector<std::string> rule_names();

}  // namespace fusedopt
