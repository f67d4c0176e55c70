#include "precision.h"

#include <stdexcept>
#include <string_view>
#include <tuple>

namespace fusedopt::plan {
namespace {

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

Precision::Precision(const RuleInterface& rule, const py::object& settings) : keys_(kKeys) {
  for (int c = 0; c < rule.state_count; ++c) keys_[static_cast<size_t>(c)] = rule.states[c];
  keys_[kAverageKey] = "ema";
  if (settings.is_none()) return;
  const auto [keys, master, seed, average, numbers] =
      settings.cast<std::tuple<std::vector<std::string>, py::object, py::object, py::object, py::object>>();
  if (keys.size() != static_cast<size_t>(rule.state_count)) throw std::invalid_argument("a key for each state");
  for (size_t c = 0; c < keys.size(); ++c) {
    keys_[c] = keys[c];
    forms_[c] = ends_with(keys[c], "_codes") ? Form::kCoded : ends_with(keys[c], "_root") ? Form::kRoot : Form::kPlain;
    coded_ |= forms_[c] == Form::kCoded;
  }
  masters_ = !master.is_none();
  if (masters_) keys_[kMasterKey] = master.cast<std::string>();
  const auto [chosen, number] = seed.cast<std::pair<bool, uint64_t>>();
  by_chance_ = chosen;
  seed_ = number;
  averages_ = !average.is_none();
  if (averages_) {
    std::tie(average_.momentum, average_.gamma, average_.begin, average_.interval) =
        average.cast<std::tuple<double, double, int64_t, int64_t>>();
    if (average_.interval < 1) throw std::invalid_argument("the interval of an average is at least 1");
  }
  numbers_ = numbers;
}

}  // namespace fusedopt::plan
