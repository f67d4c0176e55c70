#include "passes.h"

#include <algorithm>

namespace fusedopt::device {

bool DevicePasses::prepare(const Work& work, int ordinal, const Place& place) {
  place_ = place;
  numbers_.clear();
  if (!resident_.prepare(work, ordinal, place, numbers_)) return false;
  tables_ = resident_.tables();
  return true;
}

// Gives the tables the turn of the pass that is launched next; see Note [Tickets]. The tables of a captured step begin
// each replay with a control of zeros.
void DevicePasses::take_turn(const Work& work) {
  tables_.turn = work.capturing ? 0 : turn_;
  if (!work.capturing) turn_ ^= 1;
}

void DevicePasses::statistics(const Work& work, const StepSettings& s, const Report& report, double* totals,
                              uint32_t domains) {
  statistics_ = {};
  take_turn(work);
  statistics_.tables = tables_;
  statistics_.norm = s.norm;
  statistics_.rule = work.rule;
  statistics_.average = work.average;
  statistics_.check = s.check;
  statistics_.has_found_inf = s.has_found_inf;
  statistics_.refuse_nonfinite = s.error_if_nonfinite;
  statistics_.scale = numbers_.operand(s.scale);
  statistics_.found_inf = numbers_.operand(s.found_inf);
  statistics_.max_norm = numbers_.operand(s.max_norm);
  statistics_.report = report;
  statistics_.totals = totals;
  statistics_.domains = domains;
  launcher_.statistics(place_, statistics_);
}

void DevicePasses::conclude(const double* totals, int count) {
  statistics_.totals = nullptr;
  launcher_.conclude(place_, statistics_, totals, count);
}

// Calls `launch` with the arguments of each launch of the update.
void DevicePasses::for_each_update(const Work& work, const StepSettings& s, const Report& report,
                                   const std::function<void(const UpdateArguments&, const Row& like)>& launch) {
  const bool finds = s.mode() != Mode::kBare;
  UpdateArguments a{};
  a.tables = tables_;
  a.rule = work.rule;
  a.average = work.average;
  a.seed = work.seed;
  a.after_statistics = finds || launcher_.prepares_bare;
  a.reverse = finds && !work.overlaps;
  a.write_back = s.write_back;
  a.has_found_inf = s.has_found_inf;
  a.carries = resident_.carries();
  a.clip_value = s.clip_value;
  if (!a.after_statistics) {
    a.scale = numbers_.operand(s.scale);
    a.found_inf = numbers_.operand(s.found_inf);
    a.report = report;
  }
  a.tickets = std::max(1u, tables_.chunk_count);
  if (tables_.chunk_count == 0 && launcher_.prepares_bare) return;  // all that is left to do is done
  // What the statistics pass has left in the cache is of the last run.
  const std::vector<Run>& runs = resident_.runs();
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[a.reverse ? runs.size() - 1 - i : i];
    if (tables_.chunk_count && (run.chunk_count == 0 || run.kind == 0)) continue;
    a.first_chunk = run.first_chunk;
    a.chunk_count = run.chunk_count;
    launch(a, resident_.like(run));
    if (!tables_.chunk_count) break;
  }
}

void DevicePasses::load(const Work& work, const StepSettings& s) {
  if (!launcher_.load) return;
  for_each_update(work, s, {}, [this](const UpdateArguments& a, const Row& like) { launcher_.load(place_, a, like); });
}

void DevicePasses::update(const Work& work, const StepSettings& s, const Report& report) {
  if (s.mode() == Mode::kBare) take_turn(work);
  for_each_update(work, s, report, [&](const UpdateArguments& a, const Row& like) {
    // In graphs, starting early needs a newer driver.
    launcher_.update(place_, a, like, a.after_statistics && !work.capturing);
  });
}

}  // namespace fusedopt::device
