// How the states of a plan's parameters are kept, and what they have beside what the rule knows of.
#pragma once
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../rule_interface.h"
#include "../tables.h"

namespace fusedopt::plan {

// The form of a state, which the end of its key tells; see csrc/storage.h.
enum class Form : uint8_t { kPlain, kRoot, kCoded };

// Tensors of a state dict beside the step count, by their bits in what a row needs: the rule's, and two that no rule
// sees.
constexpr int kMasterKey = kMaxStates, kAverageKey = kMaxStates + 1, kKeys = kAverageKey + 1;

// Fixed when the plan is made.
class Precision {
 public:
  // `settings` is None, where all is as torch has it, or a tuple (the rule's state keys, the master's key or None,
  // (whether all is rounded by chance, the seed), (momentum, gamma, begin, interval) of the average or None, a function
  // of the groups that tells the numbers of elements, see StepPlan::find_numbers).
  Precision(const RuleInterface& rule, const py::object& settings);

  // Whether rows carry anything that their rule does not know of.
  bool carries() const { return masters_ || averages_ || draws(); }
  // Whether some number is rounded by chance: where that is asked, and codes of means of squares always.
  bool draws() const { return by_chance_ || coded_; }
  bool by_chance() const { return by_chance_; }
  uint64_t seed() const { return seed_; }
  const AverageSettings& average() const { return average_; }
  const py::object& numbers() const { return numbers_; }

  // What a parameter carries that has tensors in its state dict, as bits.
  unsigned carried(DType param) const {
    const bool masters = masters_ && (param == DType::kBFloat16 || param == DType::kFloat16);
    return (masters ? 1u << kMasterKey : 0u) | (averages_ ? 1u << kAverageKey : 0u);
  }
  const std::string& key(int index) const { return keys_[static_cast<size_t>(index)]; }
  Form form(int state) const { return forms_[state]; }

 private:
  std::vector<std::string> keys_;
  Form forms_[kMaxStates] = {};
  bool masters_ = false, averages_ = false, by_chance_ = false, coded_ = false;
  uint64_t seed_ = 0;
  AverageSettings average_;
  py::object numbers_ = py::none();
};

}  // namespace fusedopt::plan
