#include "executor.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "../tensors.h"

namespace fusedopt::device {
namespace {

constexpr size_t kUnit = 64;   // of comparing tables; uploads are multiples of it
constexpr size_t kLine = 128;  // of a device's cache

// Reserves room for `count` of T at the end of a buffer that is `size` bytes long, and tells where. What kernels write
// shares no cache line with what they only read.
template <class T>
size_t section(size_t& size, size_t count) {
  const size_t at = size;
  size = (size + count * sizeof(T) + kLine - 1) / kLine * kLine;
  return at;
}

template <class T>
T* at_offset(void* base, size_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

}  // namespace

// Where kernels can read a one-element tensor as a number: in place, or in a copy made by the stream, which a graph
// makes anew at each replay.
const void* Executor::live(c10::TensorImpl* impl, DType& dtype) {
  if (impl->device() == device_ && !foreign(impl, device_.type()) && impl->numel() == 1) {
    to_dtype(impl, dtype);
    return data_of(impl);
  }
  at::Tensor& copy = copies_[impl];
  if (!copy.defined()) {
    const at::Tensor tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(impl));
    copy = tensor.detach().to(device_, at::kDouble, /*non_blocking=*/true, /*copy=*/true);
  }
  dtype = DType::kFloat64;
  return copy.const_data_ptr();
}

Operand Executor::operand(const Number& number) {
  Operand operand{number.value, nullptr, DType::kFloat64};
  if (number.live) operand.live = live(number.live->unsafeGetTensorImpl(), operand.dtype);
  return operand;
}

// What the rows of one update have in common under `per_dtypes`, as a number; 0 for one that takes no part.
uint64_t Executor::kind_of(const TensorRow& row) {
  if (!row.grad.data || row.numel == 0) return 0;
  uint64_t kind = 0;
  auto add = [&](const Column& column) {
    kind = 8 * kind + (column.data ? 1 + static_cast<uint64_t>(column.dtype) : 0);
  };
  add(row.param);
  add(row.grad);
  for (const Column& state : row.state) add(state);
  return kind;
}

// Puts rows of one kind beside each other, when there are several kinds.
void Executor::sort_rows(const Work& work) {
  uint64_t first = 0;
  bool several = false;
  for (uint32_t r : mine_) {
    const uint64_t kind = kind_of(work.rows[r]);
    if (first == 0) first = kind;
    several |= kind != 0 && kind != first;
  }
  if (!several) return;
  std::stable_sort(mine_.begin(), mine_.end(),
                   [&](uint32_t a, uint32_t b) { return kind_of(work.rows[a]) < kind_of(work.rows[b]); });
}

// Fills host_ with what the device is to have, and tables_ with where it is in it.
void Executor::lay_out(const Work& work) {
  layouts_.clear();
  runs_.clear();
  int64_t total = 0;
  std::vector<bool> used(work.groups.size());
  for (uint32_t r : mine_) {
    total += work.rows[r].numel;
    used[work.rows[r].group] = true;
  }
  const size_t row_count = mine_.size(), group_count = work.groups.size();
  tables_.chunk_elements = chunk_elements(total);
  tables_.row_count = static_cast<uint32_t>(row_count);

  size_t size = 0;
  section<Control>(size, 1);
  const size_t groups = section<GroupRow>(size, group_count), grads = section<void*>(size, row_count);
  const size_t rows = section<Row>(size, row_count), layouts = size;
  host_.assign(size, 0);
  for (size_t g = 0; g < group_count; ++g) {
    if (!used[g]) continue;
    GroupRow& row = *at_offset<GroupRow>(host_.data(), groups + g * sizeof(GroupRow));
    std::copy_n(work.groups[g]->value, kMaxHyper, row.value);
    for (int i = 0; i < kMaxHyper; ++i) {
      if (c10::TensorImpl* impl = work.groups[g]->live[i]) row.live[i] = live(impl, row.live_dtype[i]);
    }
  }
  uint64_t chunk = 0;
  for (size_t i = 0; i < row_count; ++i) {
    const TensorRow& from = work.rows[mine_[i]];
    *at_offset<void*>(host_.data(), grads + i * sizeof(void*)) = from.grad.data;
    Row& row = *at_offset<Row>(host_.data(), rows + i * sizeof(Row));
    auto take = [&](int c, const Column& column) {
      row.dtype[c] = column.dtype;
      row.layout[c] = Row::kFlat;
      if (!column.layout) return;
      row.layout[c] = static_cast<int32_t>(layouts_.size());
      layouts_.push_back(*column.layout);
    };
    row.data[kParam] = from.param.data;
    take(kParam, from.param);
    take(kGrad, from.grad);
    for (int s = 0; s < kMaxStates; ++s) {
      row.data[kState + s] = from.state[s].data;
      take(kState + s, from.state[s]);
    }
    row.step = from.step;
    row.step_dtype = from.step_dtype;
    row.numel = from.numel;
    row.group = from.group;
    row.first_chunk = static_cast<uint32_t>(chunk);
    const uint32_t count = chunks_of(from.numel, tables_.chunk_elements);
    chunk += count;
    const uint64_t kind = launcher_.per_dtypes ? kind_of(from) : 1;
    if (runs_.empty() || work.overlaps || (kind && runs_.back().kind && kind != runs_.back().kind)) {
      runs_.push_back({kind, row.first_chunk, 0, rows + i * sizeof(Row)});
    } else if (runs_.back().kind == 0) {
      runs_.back().kind = kind;
      runs_.back().like = rows + i * sizeof(Row);
    }
    runs_.back().chunk_count += count;
  }
  if (chunk >> 31) throw std::runtime_error("the optimizer's parameters on one device make more than 2^31 chunks");
  tables_.chunk_count = static_cast<uint32_t>(chunk);
  section<Layout>(size, layouts_.size());
  host_.resize(size);
  if (!layouts_.empty()) std::memcpy(host_.data() + layouts, layouts_.data(), layouts_.size() * sizeof(Layout));

  // Offsets for now; prepare() adds the address.
  tables_.groups = at_offset<GroupRow>(nullptr, groups);
  tables_.grads = at_offset<void*>(nullptr, grads);
  tables_.rows = at_offset<Row>(nullptr, rows);
  tables_.layouts = at_offset<Layout>(nullptr, layouts);
}

// Uploads what is not known to be on the device.
void Executor::upload(char* base) {
  const size_t size = host_.size();
  std::vector<char> known;
  std::swap(known, known_);  // nothing is, while this is underway: a launch may fail
  const bool all = known.size() != size;
  auto same = [&](size_t at) { return !all && std::memcmp(host_.data() + at, known.data() + at, kUnit) == 0; };
  bool changed = false;
  for (size_t begin = 0; begin < size;) {
    if (same(begin)) {
      begin += kUnit;
      continue;
    }
    // Short runs that are the same are uploaded again, rather than beginning another launch.
    constexpr size_t kGap = 1024;
    size_t end = begin + kUnit;
    for (size_t at = end; at < size && at < end + kGap; at += kUnit) {
      if (!same(at)) end = at + kUnit;
    }
    launcher_.upload(place_, base + begin, host_.data() + begin, end - begin);
    begin = end;
    changed = true;
  }
  if (changed) known = host_;
  std::swap(known, known_);
}

bool Executor::prepare(const Work& work, int ordinal, const Place& place) {
  place_ = place;
  copies_.clear();
  captured_.reset();
  mine_.clear();
  bool active = false;
  for (size_t r = 0; r < work.rows.size(); ++r) {
    if (work.devices[r] != ordinal) continue;
    mine_.push_back(static_cast<uint32_t>(r));
    active |= work.rows[r].grad.data != nullptr;
  }
  if (!active) return false;
  if (launcher_.per_dtypes && !work.overlaps) sort_rows(work);
  lay_out(work);

  size_t size = host_.size();
  const size_t chunks = section<ChunkEntry>(size, tables_.chunk_count),
               scalars = section<RowScalars>(size, mine_.size());
  const size_t partials = section<double>(size, static_cast<size_t>(launcher_.partials) * tables_.chunk_count);
  std::vector<int64_t> structure = {tables_.chunk_elements, static_cast<int64_t>(chunks)};
  for (uint32_t r : mine_) structure.push_back(work.rows[r].numel);

  auto allocate = [&] {
    return at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte).device(device_));
  };
  if (work.capturing) {
    // Tables of its own, which the graph's replays write: another step may change the usual ones meanwhile.
    captured_ = allocate();
    if (device_.is_cpu()) emulated_.push_back(captured_);
  } else if (!memory_.defined() || static_cast<size_t>(memory_.numel()) < size) {
    memory_ = allocate();
    memory_stream_ = place.stream;
    known_.clear();
    structure_.clear();
  } else if (place.stream != memory_stream_) {
    // Freed, it must not serve another allocation before this stream is through with it.
    memory_.record_stream(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }
  char* const base = static_cast<char*>((work.capturing ? captured_ : memory_).mutable_data_ptr());
  auto place_at = [&](auto& pointer) {
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer = reinterpret_cast<Pointer>(base + reinterpret_cast<uintptr_t>(pointer));
  };
  place_at(tables_.groups);
  place_at(tables_.grads);
  place_at(tables_.rows);
  place_at(tables_.layouts);
  tables_.control = at_offset<Control>(base, 0);
  tables_.chunks = at_offset<ChunkEntry>(base, chunks);
  tables_.scalars = at_offset<RowScalars>(base, scalars);
  tables_.partials = at_offset<double>(base, partials);
  if (work.capturing) {
    launcher_.upload(place_, base, host_.data(), host_.size());
    launcher_.map_chunks(place_, tables_);
    return true;
  }
  upload(base);
  if (structure != structure_) {
    structure_.clear();
    launcher_.map_chunks(place_, tables_);
    structure_ = std::move(structure);
  }
  return true;
}

// Gives the tables the turn of the pass that is launched next; see Note [Tickets]. The tables of a captured step begin
// each replay with a control of zeros.
void Executor::take_turn(const Work& work) {
  tables_.turn = work.capturing ? 0 : turn_;
  if (!work.capturing) turn_ ^= 1;
}

void Executor::statistics(const Work& work, const StepSettings& s, const Report& report, double* total) {
  statistics_ = {};
  take_turn(work);
  statistics_.tables = tables_;
  statistics_.norm = s.norm;
  statistics_.rule = work.rule;
  statistics_.check = s.check;
  statistics_.has_found_inf = s.has_found_inf;
  statistics_.refuse_nonfinite = s.error_if_nonfinite;
  statistics_.scale = operand(s.scale);
  statistics_.found_inf = operand(s.found_inf);
  statistics_.max_norm = operand(s.max_norm);
  statistics_.report = report;
  statistics_.total = total;
  launcher_.statistics(place_, statistics_);
}

void Executor::conclude(const double* totals, int count) {
  statistics_.total = nullptr;
  launcher_.conclude(place_, statistics_, totals, count);
}

// Calls `launch` with the arguments of each launch of the update.
void Executor::for_each_update(const Work& work, const StepSettings& s, const Report& report,
                               const std::function<void(const UpdateArguments&, const Row& like)>& launch) {
  const bool finds = s.mode() != Mode::kBare;
  UpdateArguments a{};
  a.tables = tables_;
  a.rule = work.rule;
  a.after_statistics = finds || launcher_.prepares_bare;
  a.reverse = finds && !work.overlaps;
  a.write_back = s.write_back;
  a.has_found_inf = s.has_found_inf;
  a.clip_value = s.clip_value;
  if (!a.after_statistics) {
    a.scale = operand(s.scale);
    a.found_inf = operand(s.found_inf);
    a.report = report;
  }
  a.tickets = std::max(1u, tables_.chunk_count);
  if (tables_.chunk_count == 0 && launcher_.prepares_bare) return;  // all that is left to do is done
  // What the statistics pass has left in the cache is of the last run.
  for (size_t i = 0; i < runs_.size(); ++i) {
    const Run& run = runs_[a.reverse ? runs_.size() - 1 - i : i];
    if (tables_.chunk_count && (run.chunk_count == 0 || run.kind == 0)) continue;
    a.first_chunk = run.first_chunk;
    a.chunk_count = run.chunk_count;
    launch(a, *at_offset<Row>(host_.data(), run.like));
    if (!tables_.chunk_count) break;
  }
}

void Executor::load(const Work& work, const StepSettings& s) {
  if (!launcher_.load) return;
  for_each_update(work, s, {}, [this](const UpdateArguments& a, const Row& like) { launcher_.load(place_, a, like); });
}

void Executor::update(const Work& work, const StepSettings& s, const Report& report) {
  if (s.mode() == Mode::kBare) take_turn(work);
  for_each_update(work, s, report, [&](const UpdateArguments& a, const Row& like) {
    // In graphs, starting early needs a newer driver.
    launcher_.update(place_, a, like, a.after_statistics && !work.capturing);
  });
}

bool Runner::capturing(int device) const {
  const c10::OptionalDeviceGuard guard(device_of(device));
  return launcher_.capturing({device, stream_of_(device)});
}

at::Device Runner::device_of(int ordinal) const {
  return {type_, static_cast<c10::DeviceIndex>(type_ == at::kCPU ? -1 : ordinal)};
}

Executor& Runner::executor_of(int ordinal) {
  const auto index = static_cast<size_t>(ordinal);
  if (executors_.size() <= index) executors_.resize(index + 1);
  if (!executors_[index]) executors_[index] = std::make_unique<Executor>(launcher_, device_of(ordinal));
  return *executors_[index];
}

Outcome Runner::step(const Work& work, const StepSettings& s, const Wait& wait) {
  std::vector<int> devices;
  for (int device : work.devices) {
    if (device == kNowhere || (!devices.empty() && devices.back() == device)) continue;
    devices.push_back(device);
  }
  std::sort(devices.begin(), devices.end());
  devices.erase(std::unique(devices.begin(), devices.end()), devices.end());
  if (work.capturing && devices.size() > 1) {
    throw std::runtime_error("a step over several devices cannot be captured in a CUDA graph");
  }
  if (work.capturing && s.error_if_nonfinite) {
    throw std::runtime_error(
        "error_if_nonfinite=True reads the norm on the host, which a step captured in a CUDA graph cannot; set it to "
        "False (grad_norm of the optimizer's last_step can be looked at after a replay)");
  }

  Outcome outcome;
  std::vector<Executor*> active;
  try {
    for (int device : devices) {
      Executor& executor = executor_of(device);
      const c10::OptionalDeviceGuard guard(executor.device());
      if (executor.prepare(work, device, {device, stream_of_(device)})) active.push_back(&executor);
    }
    if (!active.empty()) {
      run(work, s, wait, active, outcome);
      return outcome;
    }
  } catch (...) {
    for (const auto& executor : executors_) {
      if (executor) executor->forget();
    }
    throw;
  }

  const auto options = at::TensorOptions().device(device_of(devices.empty() ? 0 : devices[0])).dtype(at::kFloat);
  if (s.mode() == Mode::kFull) {
    outcome.scalars = at::zeros({2}, options);
    outcome.scalars.select(0, 1).fill_(1);
  }
  if (s.has_found_inf) {
    const at::Tensor given = s.found_inf.live ? s.found_inf.live->detach() : at::full({}, s.found_inf.value, options);
    outcome.found_inf = given.to(options.device(), at::kDouble, /*non_blocking=*/true).ne(0).to(at::kFloat).reshape({});
  }
  return outcome;
}

// The passes, with something to work on.
void Runner::run(const Work& work, const StepSettings& s, const Wait& wait, const std::vector<Executor*>& active,
                 Outcome& outcome) {
  const bool full = s.mode() == Mode::kFull, tells = s.check || s.has_found_inf;
  // A norm that is to be finite is judged as precisely as it was found.
  const bool in_double = work.any_double || (full && s.error_if_nonfinite);
  const auto options = at::TensorOptions().device(active[0]->device()).dtype(in_double ? at::kDouble : at::kFloat);
  Report report{};
  const bool together = full && tells && !in_double;  // one small allocation
  if (full) {
    outcome.scalars = at::empty({together ? 3 : 2}, options);
    report.scalars = outcome.scalars.mutable_data_ptr();
    report.scalars_are_double = in_double;
    if (together) outcome.found_inf = outcome.scalars.select(0, 2);
  }
  if (tells) {
    if (!together) outcome.found_inf = at::empty({}, options.dtype(at::kFloat));
    report.found_inf = static_cast<float*>(outcome.found_inf.mutable_data_ptr());
  }

  for (Executor* executor : active) {
    const c10::OptionalDeviceGuard guard(executor->device());
    executor->load(work, s);
  }
  const bool finds = s.mode() != Mode::kBare;
  auto report_of = [&](Executor* executor) { return executor == active[0] ? report : Report{}; };
  if (finds && active.size() > 1) {
    const auto count = static_cast<int64_t>(active.size());
    std::vector<at::Tensor> totals;
    for (Executor* executor : active) {
      const c10::OptionalDeviceGuard guard(executor->device());
      totals.push_back(at::empty({2}, at::TensorOptions().device(executor->device()).dtype(at::kDouble)));
      executor->statistics(work, s, report_of(executor), static_cast<double*>(totals.back().mutable_data_ptr()));
    }
    for (Executor* executor : active) {
      const c10::OptionalDeviceGuard guard(executor->device());
      const at::Tensor all = at::empty({count, 2}, at::TensorOptions().device(executor->device()).dtype(at::kDouble));
      for (int64_t i = 0; i < count; ++i) all.select(0, i).copy_(totals[static_cast<size_t>(i)], /*non_blocking=*/true);
      executor->conclude(static_cast<const double*>(all.const_data_ptr()), static_cast<int>(count));
    }
  } else if (finds || launcher_.prepares_bare) {
    for (Executor* executor : active) {
      const c10::OptionalDeviceGuard guard(executor->device());
      executor->statistics(work, s, report_of(executor), nullptr);
    }
  }
  if (full && s.error_if_nonfinite) {
    double norm = 0;
    bool skipped = false;
    wait([&] {
      const at::Tensor found = outcome.scalars.to(at::kCPU);
      norm = static_cast<const double*>(found.const_data_ptr())[0];
      skipped = outcome.found_inf.defined() && outcome.found_inf.item<float>() != 0;
    });
    if (!skipped && !std::isfinite(norm)) refuse_norm(norm);
    if (!work.any_double) outcome.scalars = outcome.scalars.to(at::kFloat);
  }
  for (Executor* executor : active) {
    const c10::OptionalDeviceGuard guard(executor->device());
    executor->update(work, s, report_of(executor));
  }
}

}  // namespace fusedopt::device
