// Loops over rows, in several threads where there are many.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace fusedopt::plan {

// Note [Rows in threads]
// Of thousands of small tensors, what a step reads of Python's and torch's objects takes longer than the update itself,
// and most of that is waiting for memory. So it is dealt out to torch's intra-op threads. The thread that makes the
// step has the GIL and waits for the others, so nothing of Python changes meanwhile; the others read objects, but call
// nothing of Python's, count no references, and leave whatever is not as it was to the first thread. Only where the
// update is the CPU's too: where a GPU makes it, the processors are often busy with loading data, and to wait for a
// thread that does not get one takes longer than all of this.

// Rows that a thread takes at a time, and the least for each further thread.
constexpr size_t kRangeRows = 256, kRowsPerThread = 2048;

// Calls visit(begin, end) for ranges that together are all of 0 ... count.
template <class Visit>
void for_ranges(size_t count, bool in_threads, const Visit& visit) {
  const size_t most = in_threads ? static_cast<size_t>(at::get_num_threads()) : 1;
  const size_t threads = std::min(most, 1 + count / kRowsPerThread);
  std::atomic<size_t> next{0};
  auto run = [&] {
    for (size_t begin; (begin = next.fetch_add(kRangeRows, std::memory_order_relaxed)) < count;) {
      visit(begin, std::min(count, begin + kRangeRows));
    }
  };
  if (threads <= 1 || count <= kRangeRows || at::in_parallel_region()) return run();
  at::parallel_for(0, static_cast<int64_t>(threads), 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) run();
  });
}

}  // namespace fusedopt::plan
