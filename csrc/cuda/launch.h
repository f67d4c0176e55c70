// Launching the kernels. No torch: raw pointers, and a stream.
#pragma once
#include <stddef.h>

#include <optional>
#include <string>

#include "tables.h"

namespace fusedopt::cuda {

struct Place {
  int device;
  void* stream;
};

// Every function throws std::runtime_error with CUDA's words when a call fails, none waits for the device, and all may
// leave it the current one.
struct Launcher {
  // Loads the kernels, which must not happen while a graph is captured.
  void (*load)(int device);
  bool (*capturing)(const Place&);
  // Writes host memory to the device through kernel arguments, see Note [Uploads]. All are multiples of 16 bytes.
  void (*upload)(const Place&, void* to, const void* from, size_t bytes);
  // Fills in the chunk map from the rows.
  void (*map_chunks)(const Place&, const Tables&);
  void (*statistics)(const Place&, const StatisticsArguments&);
  // Draws the conclusions of a statistics pass over several devices: `totals` has two numbers of each.
  void (*conclude)(const Place&, const StatisticsArguments&, const double* totals, int count);
  // With `early`, its blocks may start while the kernel before is still running.
  void (*update)(const Place&, const UpdateArguments&, bool early);
};

// The kernels on the GPU, or null in a build without CUDA.
const Launcher* gpu_launcher();

// The same source as host code, for tests without a GPU, or null in a build without it. See Note [Emulation].
const Launcher* emulated_launcher();

}  // namespace fusedopt::cuda
