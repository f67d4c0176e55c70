#include "resident_tables.h"

#include <ATen/Functions.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <type_traits>
#include <utility>

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

// Whether a row has more than its rule knows of, or forms that are no dtype of torch's.
bool carries_more(const TensorRow& row) {
  if (row.carried && (row.carried->master.data || row.carried->average.data || row.carried->chance.rounds)) return true;
  return std::any_of(std::begin(row.state), std::end(row.state),
                     [](const Column& state) { return state.data && state.dtype > DType::kFloat16; });
}

// What the rows of one update have in common under `per_dtypes`, as a number; 0 for one that takes no part.
uint64_t kind_of(const TensorRow& row) {
  if (!row.grad.data || row.numel == 0) return 0;
  uint64_t kind = 0;
  auto add = [&](const Column& column) {
    kind = 16 * kind + (column.data ? 1 + static_cast<uint64_t>(column.dtype) : 0);
  };
  add(row.param);
  add(row.grad);
  for (const Column& state : row.state) add(state);
  if (const Carried* carried = row.carried) {
    add(carried->master);
    add(carried->average);
    kind = 2 * kind + (carried->chance.rounds ? 1 : 0);
  }
  return kind;
}

}  // namespace

const void* LiveNumbers::address(c10::TensorImpl* impl, DType& dtype) {
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

Operand LiveNumbers::operand(const Number& number) {
  Operand operand{number.value, nullptr, DType::kFloat64};
  if (number.live) operand.live = address(number.live->unsafeGetTensorImpl(), operand.dtype);
  return operand;
}

// Puts rows of one kind beside each other, when there are several kinds.
void ResidentTables::sort_rows(const Work& work) {
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

// Fills host_ with the groups that rows of this device are in.
void ResidentTables::lay_out_groups(const Work& work, LiveNumbers& numbers, size_t groups) {
  std::vector<bool> used(work.groups.size());
  for (uint32_t r : mine_) used[work.rows[r].group] = true;
  for (size_t g = 0; g < work.groups.size(); ++g) {
    if (!used[g]) continue;
    GroupRow& row = *at_offset<GroupRow>(host_.data(), groups + g * sizeof(GroupRow));
    std::copy_n(work.groups[g]->value, kMaxHyper, row.value);
    for (int i = 0; i < kMaxHyper; ++i) {
      if (c10::TensorImpl* impl = work.groups[g]->live[i]) row.live[i] = numbers.address(impl, row.live_dtype[i]);
    }
  }
}

// Adds a row to the last run, or begins another one.
void ResidentTables::extend_runs(const Work& work, uint64_t kind, uint32_t first_chunk, uint32_t chunk_count,
                                 size_t row) {
  if (runs_.empty() || work.overlaps || (kind && runs_.back().kind && kind != runs_.back().kind)) {
    runs_.push_back({kind, first_chunk, 0, row});
  } else if (runs_.back().kind == 0) {
    runs_.back().kind = kind;
    runs_.back().like = row;
  }
  runs_.back().chunk_count += chunk_count;
}

// Fills host_ with rows and gradients, and finds layouts, runs and the number of chunks.
void ResidentTables::lay_out_rows(const Work& work, size_t rows, size_t grads) {
  layouts_.clear();
  runs_.clear();
  carries_ = false;
  uint64_t chunk = 0;
  for (size_t i = 0; i < mine_.size(); ++i) {
    const TensorRow& from = work.rows[mine_[i]];
    const size_t at = rows + i * sizeof(Row);
    carries_ |= carries_more(from);
    *at_offset<void*>(host_.data(), grads + i * sizeof(void*)) = from.grad.data;
    Row& row = *at_offset<Row>(host_.data(), at);
    auto number_of = [&](const Layout* layout) {
      if (!layout) return Row::kFlat;
      layouts_.push_back(*layout);
      return static_cast<int32_t>(layouts_.size() - 1);
    };
    auto take = [&](int c, const Column& column) {
      row.dtype[c] = column.dtype;
      row.layout[c] = number_of(column.layout);
    };
    row.data[kParam] = from.param.data;
    take(kParam, from.param);
    take(kGrad, from.grad);
    for (int s = 0; s < kMaxStates; ++s) {
      row.data[kState + s] = from.state[s].data;
      take(kState + s, from.state[s]);
    }
    const Carried nothing{};
    const Carried& carried = from.carried ? *from.carried : nothing;
    row.data[kMaster] = carried.master.data;
    take(kMaster, carried.master);
    row.data[kAverage] = carried.average.data;
    take(kAverage, carried.average);
    row.by_chance = carried.chance.rounds;
    row.stream = carried.chance.stream;
    row.first_number = carried.chance.first;
    row.numbers = number_of(carried.chance.numbers);
    row.step = from.step;
    row.step_dtype = from.step_dtype;
    row.numel = from.numel;
    row.group = from.group;
    row.domain = work.domains[mine_[i]];
    row.first_chunk = static_cast<uint32_t>(chunk);
    const uint32_t count = chunks_of(from.numel, tables_.chunk_elements);
    chunk += count;
    extend_runs(work, launcher_.per_dtypes ? kind_of(from) : 1, row.first_chunk, count, at);
  }
  if (chunk >> 31) throw std::runtime_error("the optimizer's parameters on one device make more than 2^31 chunks");
  tables_.chunk_count = static_cast<uint32_t>(chunk);
}

// Fills host_ with what the device is to have, and tables_ with where it is in it.
void ResidentTables::lay_out(const Work& work, LiveNumbers& numbers) {
  int64_t total = 0;
  for (uint32_t r : mine_) total += work.rows[r].numel;
  const size_t row_count = mine_.size();
  tables_.chunk_elements = chunk_elements(total);
  tables_.row_count = static_cast<uint32_t>(row_count);

  size_t size = 0;
  section<Control>(size, 1);
  const size_t groups = section<GroupRow>(size, work.groups.size()), grads = section<void*>(size, row_count);
  const size_t rows = section<Row>(size, row_count), layouts = size;
  host_.assign(size, 0);
  lay_out_groups(work, numbers, groups);
  lay_out_rows(work, rows, grads);
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
void ResidentTables::upload(const Place& place, char* base) {
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
    launcher_.upload(place, base + begin, host_.data() + begin, end - begin);
    begin = end;
    changed = true;
  }
  if (changed) known = host_;
  std::swap(known, known_);
}

// Takes the rows on this device; false when none of them takes part.
bool ResidentTables::find_rows(const Work& work, int ordinal) {
  mine_.clear();
  bool active = false;
  for (size_t r = 0; r < work.rows.size(); ++r) {
    if (work.devices[r] != ordinal) continue;
    mine_.push_back(static_cast<uint32_t>(r));
    active |= work.rows[r].grad.data != nullptr;
  }
  return active;
}

// Memory for tables of so many bytes.
char* ResidentTables::reserve(const Work& work, const Place& place, size_t size) {
  auto allocate = [&] {
    return at::empty({static_cast<int64_t>(size)}, at::TensorOptions().dtype(at::kByte).device(device_));
  };
  if (work.capturing) {
    // Tables of its own, which the graph's replays write: another step may change the usual ones meanwhile.
    captured_ = allocate();
    if (device_.is_cpu()) emulated_.push_back(captured_);
    return static_cast<char*>(captured_.mutable_data_ptr());
  }
  if (!memory_.defined() || static_cast<size_t>(memory_.numel()) < size) {
    memory_ = allocate();
    memory_stream_ = place.stream;
    known_.clear();
    structure_.clear();
  } else if (place.stream != memory_stream_) {
    // Freed, it must not serve another allocation before this stream is through with it.
    memory_.record_stream(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  }
  return static_cast<char*>(memory_.mutable_data_ptr());
}

bool ResidentTables::prepare(const Work& work, int ordinal, const Place& place, LiveNumbers& numbers) {
  captured_.reset();
  if (!find_rows(work, ordinal)) return false;
  if (launcher_.per_dtypes && !work.overlaps) sort_rows(work);
  lay_out(work, numbers);

  size_t size = host_.size();
  const size_t chunks = section<ChunkEntry>(size, tables_.chunk_count),
               scalars = section<RowScalars>(size, mine_.size());
  const size_t partials = section<double>(size, static_cast<size_t>(launcher_.partials) * tables_.chunk_count);
  std::vector<int64_t> structure = {tables_.chunk_elements, static_cast<int64_t>(chunks)};
  for (uint32_t r : mine_) structure.push_back(work.rows[r].numel);

  char* const base = reserve(work, place, size);
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
    launcher_.upload(place, base, host_.data(), host_.size());
    launcher_.map_chunks(place, tables_);
    return true;
  }
  upload(place, base);
  if (structure != structure_) {
    structure_.clear();
    launcher_.map_chunks(place, tables_);
    structure_ = std::move(structure);
  }
  return true;
}

}  // namespace fusedopt::device
