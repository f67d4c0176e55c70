// Fetching what the next rows need.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace fusedopt::plan {

// Note [Cold caches]
// After a forward and backward pass nothing of an optimizer's objects is in the caches, and a step of many small
// tensors is one long chase: parameter, autograd metadata, gradient, storage, state tensors. Followed one after the
// other, each miss waits for the one before. So every loop over rows prefetches, some rows ahead, all that the last
// step went through: an address kept from an earlier step is only ever prefetched, which does no harm whatever lies
// there now. A processor has some dozens of misses underway at most, so what counts is the number of lines: what is
// kept of a row at every step fills whole lines, and is not written unless it has changed.
constexpr size_t kAhead = 8;

// Note [Prefetching]
// g++ treats a function that only prefetches as free of side effects and deletes the calls, so these and what calls
// them are inline by force; a test looks for the instructions in the module. Each line that is fetched in vain costs as
// much as one that is needed.

// What is read of every tensor (storage, version, count and flags), and of one whose sizes are looked at.
[[gnu::always_inline]] inline void prefetch_tensor(const c10::TensorImpl* impl, bool with_sizes) {
  const char* address = reinterpret_cast<const char*>(impl);
  __builtin_prefetch(address + 16);
  if (with_sizes) {
    __builtin_prefetch(address + 64);
    __builtin_prefetch(address + 111);
  }
  __builtin_prefetch(address + 152);
  __builtin_prefetch(address + 175);
}

[[gnu::always_inline]] inline void prefetch_storage(const c10::StorageImpl* storage) {
  const char* address = reinterpret_cast<const char*>(storage);
  __builtin_prefetch(address + 16);
  __builtin_prefetch(address + 59);
}

// What is read of a tensor's Python object: its type, and where its tensor is.
[[gnu::always_inline]] inline void prefetch_object(const PyObject* object) {
  const char* address = reinterpret_cast<const char*>(object);
  __builtin_prefetch(address + 8);
  __builtin_prefetch(address + 16);
}

}  // namespace fusedopt::plan
