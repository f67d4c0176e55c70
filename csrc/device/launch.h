// Launching the kernels. No torch: raw pointers, and a stream.
#pragma once
#include <stddef.h>

#include <functional>

#include "tables.h"

namespace fusedopt::device {

struct Place {
  int device;
  void* stream;
};

// One family of kernels. Every function throws std::runtime_error in the words of the device's runtime when a call
// fails, none waits for the device, and all may leave it the current one.
struct Launcher {
  std::function<bool(const Place&)> capturing;
  // Makes everything ready that update() needs with these arguments, before the step has changed anything: what can go
  // wrong then leaves all as it was. Null where nothing is to be made ready.
  std::function<void(const Place&, const UpdateArguments&, const Row& like)> load;
  // Writes host memory to the device, ordered with the stream and, in a capture, at each replay. The memory may be
  // anything's once this returns. All are multiples of 16 bytes.
  std::function<void(const Place&, void* to, const void* from, size_t bytes)> upload;
  // Fills in the chunk map from the rows.
  std::function<void(const Place&, const Tables&)> map_chunks;
  std::function<void(const Place&, const StatisticsArguments&)> statistics;
  // Draws the conclusions of a first half: `totals` has `count` pairs of a total and whether all is finite.
  std::function<void(const Place&, const StatisticsArguments&, const double* totals, int count)> conclude;
  // `like` is one of the rows, on the host. With `early`, blocks may start while the kernel before is still running.
  std::function<void(const Place&, const UpdateArguments&, const Row& like, bool early)> update;

  // Numbers that the statistics pass keeps of a chunk.
  int partials = 1;
  // Whether the scalars of a bare step, too, are made by statistics(), rather than by each block of the update.
  bool prepares_bare = false;
  // Whether the rows of one update() must have the same columns, of the same dtypes.
  bool per_dtypes = false;
};

}  // namespace fusedopt::device
