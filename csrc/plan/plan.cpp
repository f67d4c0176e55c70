#include "plan.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "../cuda/launchers.h"
#include "../python_launcher.h"
#include "numbers.h"
#include "ranges.h"

namespace fusedopt {

Number StepPlan::number(const py::object& value) const {
  if (!THPVariable_Check(value.ptr())) return {value.cast<double>()};
  const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
  if (kernels_.target.reads(tensor) && tensor.numel() == 1) return {0, &tensor};
  return {plan::scalar_of(tensor)};
}

StepPlan::Kernels StepPlan::kernels_for(const std::string& device, const py::object& object) {
  Kernels kernels;
  std::function<void*(int)> stream_of = [](int) -> void* { return nullptr; };
  auto streams_from = [&](const py::object& current) {
    stream_of = [current](int index) { return reinterpret_cast<void*>(current(index).cast<uintptr_t>()); };
  };
  const device::Launcher* launcher = nullptr;
  c10::DeviceType& type = kernels.target.type;
  if (!object.is_none()) {
    type = c10::Device(device).type();
    kernels.launcher = std::make_unique<device::Launcher>(python_launcher(object, type));
    launcher = kernels.launcher.get();
    streams_from(object.attr("stream"));
  } else if (device == "cpu") {
    return kernels;
  } else if (device == "emulated") {
    launcher = cuda::emulated_launcher();
  } else if (device == "cuda") {
    type = at::kCUDA;
    launcher = cuda::gpu_launcher();
    // torch's C++ way would make the module depend on a CUDA build of torch.
    streams_from(py::module_::import("torch._C").attr("_cuda_getCurrentRawStream"));
  }
  if (!launcher) throw std::invalid_argument("this build has no kernels for the device '" + device + "'");
  kernels.target.device_kernels = true;
  kernels.executor = std::make_unique<device::Executor>(*launcher, type, std::move(stream_of));
  return kernels;
}

StepPlan::StepPlan(const std::string& rule, const std::string& device, int emulated_devices, const py::object& launcher,
                   const py::object& shards, const py::object& precision)
    : rule_(rule_named(rule)),
      kernels_(kernels_for(device, launcher)),
      emulated_devices_(emulated_devices),
      precision_(rule_, precision),
      groups_(rule_, kernels_.target),
      rows_(kernels_.target, precision_),
      states_(rule_, kernels_.target, precision_),
      cpu_step_(rule_, precision_.average()),
      shards_(shards) {}

void StepPlan::refresh(PyObject* groups, PyObject* state, PyObject* counts, bool write_back, plan::Problems& problems) {
  try {
    bring_up_to_date(groups, state, counts, write_back, problems);
  } catch (...) {
    groups_.forget();  // half read: start afresh at the next step
    throw;
  }
}

void StepPlan::bring_up_to_date(PyObject* groups, PyObject* state, PyObject* counts, bool write_back,
                                plan::Problems& problems) {
  if (!groups_.unchanged(groups, rows_)) {
    states_.forget();
    groups_.read(groups, rows_);
  }
  if (groups_.edited() && !groups_.number(rows_)) states_.forget();
  const bool looked = look(state, counts, write_back, problems);
  if (rows_.take_news()) domains_known_ = false;
  if (!domains_known_) {
    find_domains(groups);
    if (precision_.draws()) find_numbers(groups);
    if (kernels_.executor) place_rows();
    domains_known_ = true;
  }
  states_.refresh(state, counts, groups_, rows_, problems, looked);
}

// Brings the rows up to date. Returns whether their states, too, have been found as they were, and are.
bool StepPlan::look(PyObject* state, PyObject* counts, bool write_back, plan::Problems& problems) {
  const bool states = states_.can_look(state, counts, rows_);
  std::atomic<bool> looked{states};
  plan::Rows::Seen all;
  std::mutex one_at_a_time;
  plan::for_ranges(rows_.size(), !kernels_.executor, [&](size_t begin, size_t end) {
    plan::Rows::Seen seen;
    rows_.look(begin, end, write_back, seen);
    if (states && !states_.look(begin, end, rows_)) looked.store(false, std::memory_order_relaxed);
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    all.add(seen);
  });
  if (!rows_.attend(all, write_back, problems)) {
    states_.forget();
    looked = false;
  }
  return looked;
}

void StepPlan::find_domains(PyObject* groups) {
  const py::object found = shards_.is_none() ? py::none() : shards_(py::handle(groups));
  spread_ = !found.is_none();
  domains_ = 1;
  std::vector<uint32_t> domains(rows_.size(), 0);
  if (spread_) std::tie(domains, domains_) = found.cast<std::pair<std::vector<uint32_t>, uint32_t>>();
  if (domains.size() != rows_.size()) throw std::runtime_error("the parameters changed while they were looked at");
  for (uint32_t domain : domains) {
    if (domain >= domains_) throw std::out_of_range("a parameter is in a domain that there is not");
  }
  rows_.domains = std::move(domains);
}

// The numbers of a row's elements in the whole of its parameter, of which a process may have a part: `numbers` of the
// plan's precision, called with the groups, returns a list with None for each whole parameter, and a tuple (number of
// the first element, sizes, distances of numbers) for each part, along its dimensions in canonical order.
void StepPlan::find_numbers(PyObject* groups) {
  using Numbers = std::tuple<uint64_t, std::vector<int64_t>, std::vector<int64_t>>;
  const auto found = precision_.numbers()(py::handle(groups)).cast<std::vector<std::optional<Numbers>>>();
  if (found.size() != rows_.size()) throw std::runtime_error("the parameters changed while they were looked at");
  for (size_t r = 0; r < rows_.size(); ++r) {
    plan::CarriedRow& row = rows_.carried[r];
    Chance& chance = row.carried.chance;
    chance.first = 0;
    chance.numbers = nullptr;
    if (!found[r]) continue;
    const auto& [first, sizes, distances] = *found[r];
    if (sizes.size() != distances.size() || sizes.size() > kMaxDims) {
      throw std::runtime_error("a parameter of which this process has a part has more than 16 dimensions");
    }
    chance.first = first;
    if (sizes.empty()) continue;
    row.numbers = std::make_unique<Layout>();
    row.numbers->dims = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), row.numbers->size);
    std::copy(distances.begin(), distances.end(), row.numbers->stride);
    chance.numbers = row.numbers.get();
  }
}

void StepPlan::place_rows() {
  row_devices_.resize(rows_.size());
  devices_.clear();
  for (size_t r = 0; r < rows_.size(); ++r) {
    int& device = row_devices_[r];
    device = rows_.hot[r].problem               ? device::kNowhere
             : kernels_.target.type == at::kCPU ? static_cast<int>(r) % emulated_devices_
                                                : rows_.cold[r].order.device().index();
    if (device != device::kNowhere) devices_.insert(device);
  }
}

bool StepPlan::capturing() const {
  return std::any_of(devices_.begin(), devices_.end(),
                     [this](int device) { return kernels_.executor->capturing(device); });
}

// A replay runs nothing of this plan, so what a captured step leaves out is left out for good: better to say so.
plan::Problems StepPlan::refused_in_capture() const {
  plan::Problems problems;
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (rows_.table[r].grad.data) {
      if (rows_.cold[r].state_problem == plan::kNoState) {
        problems.push_back(
            {r, "has no state yet, which a captured step would make anew at each replay; step once before capturing"});
      }
    } else if (THPVariable_Unpack(rows_.objects[r]).requires_grad()) {
      problems.push_back(
          {r,
           "has no gradient while a CUDA graph is captured: replays would never update it. Give it one (zeros) before "
           "capturing, or requires_grad_(False)"});
    }
  }
  return problems;
}

// Problems as step() returns them.
py::list StepPlan::told(const plan::Problems& problems, bool can_mend) const {
  py::list list;
  for (const plan::Problem& problem : problems) {
    const plan::ColdRow& row = rows_.cold[problem.row];
    const py::object state_only = can_mend ? py::object(py::bool_(problem.text == plan::kNoState)) : py::none();
    list.append(py::make_tuple(row.group, row.index, problem.text, state_only));
  }
  return list;
}

device::Work StepPlan::work(bool capturing) const {
  return {rows_.table,       row_devices_,
          rows_.domains,     groups_.table(),
          rule_.id,          precision_.average(),
          precision_.seed(), rows_.participants.any_double,
          rows_.overlaps,    capturing};
}

py::object StepPlan::on_devices(const StepSettings& s,
                                const std::function<device::Outcome(const device::Executor::Wait&)>& run) {
  // Until the step is counted, which writes to what it worked on. A launcher in Python may take seconds to compile,
  // while other threads run.
  plan::Held held = kernels_.launcher ? rows_.hold() : plan::Held();
  // A thread that waits for the device must let the others run: one of them may have to launch what it waits for.
  auto wait = [&](const std::function<void()>& read) {
    if (held.objects.empty()) held = rows_.hold();
    const py::gil_scoped_release unlocked;
    read();
  };
  device::Outcome outcome = run(wait);
  rows_.count_up(s.write_back, /*steps=*/false);
  auto wrapped = [](at::Tensor& tensor) -> py::object {
    if (!tensor.defined()) return py::none();
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(tensor)));
  };
  return py::make_tuple(wrapped(outcome.scalars), wrapped(outcome.found_inf));
}

py::object StepPlan::first_half(const StepSettings& s, bool capturing) {
  plan::Held held = rows_.hold();
  at::Tensor pairs =
      kernels_.executor ? kernels_.executor->find(work(capturing), s, domains_) : cpu_step_.find(rows_, s, domains_);
  if (!pairs.defined()) return py::none();
  half_.emplace(Half{s, capturing, std::move(held)});
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(pairs)));
}

namespace {

// The passes run without the GIL, so another thread may get here, or drop what they work on. Reading a hyperparameter
// may run Python, too.
class Running {
 public:
  explicit Running(bool& flag) : flag_(flag) {
    if (flag) throw std::runtime_error("a step of this optimizer is running in another thread");
    flag = true;
  }
  ~Running() { flag_ = false; }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  bool& flag_;
};

}  // namespace

py::object StepPlan::step(const py::object& groups, const py::dict& state, const py::object& counts,
                          const StepSettings& s, bool half, bool agreed) {
  const Running running(running_);
  if (half_) throw std::runtime_error("a step of this optimizer is half done, perhaps in another thread");
  plan::Problems problems;
  refresh(groups.ptr(), state.ptr(), counts.is_none() ? nullptr : counts.ptr(), s.write_back, problems);
  const bool capturing = kernels_.executor && this->capturing();
  if (capturing) {
    const plan::Problems refused = refused_in_capture();
    if (!refused.empty()) return told(refused, false);
  }
  if (!problems.empty()) return told(problems, true);
  if (half || (spread_ && s.mode() != Mode::kBare)) {
    StepSettings asked = s;
    if (s.has_found_inf && !half) {  // what was found elsewhere comes with the pairs
      asked.has_found_inf = false;
      asked.check = true;
    }
    return first_half(asked, capturing);
  }
  if (s.has_found_inf && spread_ && !agreed) return py::bool_(false);
  if (!kernels_.executor) return cpu_step_.run(groups_, rows_, s);
  return on_devices(s, [&](const auto& wait) { return kernels_.executor->step(work(capturing), s, wait); });
}

py::object StepPlan::finish(const at::Tensor& pairs) {
  const Running running(running_);
  if (!half_) throw std::runtime_error("there is no first half of a step to finish");
  if (pairs.dim() != 2 || pairs.size(1) != 2 || pairs.scalar_type() != at::kDouble) {
    throw std::invalid_argument("what the first halves found comes as pairs in float64, (n, 2)");
  }
  const Half half = *std::exchange(half_, std::nullopt);
  if (!kernels_.executor) return cpu_step_.finish(groups_, rows_, half.settings, pairs.to(at::kCPU).contiguous());
  return on_devices(half.settings, [&](const auto& wait) {
    return kernels_.executor->finish(work(half.capturing), half.settings, wait, pairs);
  });
}

}  // namespace fusedopt
