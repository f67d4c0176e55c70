#include "executor.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fusedopt::cpu {
namespace {

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found = {kernels_baseline()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kernels_avx2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    found.push_back(kernels_avx2());
  }
  if (kernels_avx512() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(kernels_avx512());
  }
#endif
  return found;
}

const std::vector<const Kernels*>& all_kernels() {
  static const std::vector<const Kernels*> found = find_kernels();
  return found;
}

const Kernels* kernels_named(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : all_kernels()) {
    if (name == kernels->isa) return kernels;
    known += (known.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument("CPU instruction set '" + name + "' is not available; expected one of " + known);
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* forced = std::getenv("FUSEDOPT_CPU_ISA");
    return forced && *forced ? kernels_named(forced) : all_kernels().back();
  }();
  return kernels;
}

// Below this many elements for each further thread, waking it costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;
// What a chunk costs beside its elements, in elements.
constexpr int64_t kChunkOverhead = 256;

// Chunks between prefetching the data of one and working on it, and the elements from which a chunk is left to the
// hardware's own prefetching.
constexpr int64_t kAhead = 4, kPrefetchElements = 256;

// Inline by force: g++ takes a function that only prefetches for one without effect, and drops the calls.
[[gnu::always_inline]] inline void prefetch(const Column& column, int64_t elements) {
  if (!column.data || column.layout) return;
  const char* data = static_cast<const char*>(column.data);
  for (int64_t byte = 0; byte < elements * element_size(column.dtype); byte += 64) __builtin_prefetch(data + byte);
}

// Calls visit(chunk index) for every chunk of a row that takes part, from one parallel region. Each thread takes a long
// run of the chunks that are left, and shorter ones towards the end, down to about kChunkElements: long runs keep the
// hardware's prefetching going (chunks taken in turns cost 20 % of the bandwidth), and a slow thread holds up no one.
// Some chunks earlier, prepare(row, elements) is called for a short one.
template <class Prepare, class Visit>
void for_each_chunk(const Work& work, const Prepare& prepare, const Visit& visit) {
  const int64_t count = static_cast<int64_t>(work.chunks.size());
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      if (c + kAhead < end) {
        const Chunk& ahead = work.chunks[c + kAhead];
        if (ahead.length <= kPrefetchElements) prepare(work.rows[ahead.row], ahead.length);
      }
      if (work.rows[work.chunks[c].row].grad.data) visit(c);
    }
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), 1 + work.elements / kElementsPerThread);
  if (threads <= 1 || count <= 1 || work.in_order || at::in_parallel_region()) return run(0, count);

  std::atomic<int64_t> next{0};
  const int64_t mean = work.elements / count + kChunkOverhead;
  const int64_t least = std::max<int64_t>(1, (kChunkElements + kChunkOverhead) / mean);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) {
      int64_t begin = next.load(std::memory_order_relaxed);
      while (begin < count) {
        const int64_t end = std::min(count, begin + std::max(least, (count - begin) / (2 * threads)));
        if (next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
          run(begin, end);
          begin = next.load(std::memory_order_relaxed);
        }
      }
    }
  });
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : all_kernels()) names.emplace_back(kernels->isa);
  return names;
}

std::string isa_in_use() { return current().load()->isa; }

void use_isa(const std::string& name) { current().store(kernels_named(name)); }

bool statistics(const Work& work, const StatisticsSettings& settings, std::vector<double>& partials) {
  const StatisticsFn run = current().load()->statistics;
  partials.assign(work.chunks.size(), 0.0);
  std::atomic<bool> nonfinite{false};
  auto prepare = [](const TensorRow& row, int64_t elements)
                     __attribute__((always_inline)) { prefetch(row.grad, elements); };
  for_each_chunk(work, prepare, [&](int64_t c) {
    const Chunk& chunk = work.chunks[c];
    if (run(work.rows[chunk.row].grad, settings, chunk.offset, chunk.length, &partials[c])) {
      nonfinite.store(true, std::memory_order_relaxed);
    }
  });
  return nonfinite.load();
}

void update(const Work& work, RuleId rule, const Scalars& scalars, const UpdateSettings& settings) {
  const UpdateFn run = current().load()->update[rule];
  auto prepare = [](const TensorRow& row, int64_t elements) __attribute__((always_inline)) {
    prefetch(row.grad, elements);
    prefetch(row.param, elements);
    for (const Column& state : row.state) prefetch(state, elements);
  };
  for_each_chunk(work, prepare, [&](int64_t c) {
    const Chunk& chunk = work.chunks[c];
    const TensorRow& row = work.rows[chunk.row];
    run(row, scalars[chunk.row], settings, chunk.offset, chunk.length);
  });
}

}  // namespace fusedopt::cpu
