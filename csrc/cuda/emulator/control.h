// What tests may tell the emulator. See Note [Emulation].
#pragma once
#include <stdint.h>

#include <functional>
#include <memory>
#include <vector>

#include "../../ptx/module.h"

namespace fusedopt::cuda::emulated {

// What tests may choose.
struct Settings {
  uint64_t order = 0;  // of blocks and threads: 0 as numbered, else drawn from this seed
  bool slow_double = false;
  bool dry = false;   // count launches, but run nothing
  uint32_t lost = 0;  // blocks that are left out of every launch of more
  // Run this code, nvcc's PTX of the kernels, in place of the host code. See docs/ptx.md.
  std::vector<std::shared_ptr<const ptx::Module>> ptx;
};
Settings& settings();
// Launches recorded instead of run, as a stream does that captures a CUDA graph.
struct Graph {
  std::vector<std::function<void()>> launches;
  void replay() const;
};
void begin_capture();
std::shared_ptr<Graph> end_capture();
uint64_t launch_count();  // so far, uploads included

}  // namespace fusedopt::cuda::emulated
