// Runs kernels: the interpreter's interface.
#pragma once
#include "module.h"

namespace fusedopt::ptx {

struct Argument {
  const void* data;
  size_t bytes;
};

struct Launch {
  uint32_t blocks = 1;
  int warps = 1;
  size_t dynamic_shared = 0;
  bool early = false;  // launched to start while the kernel before runs (programmatic stream serialization)
  uint64_t order = 0;  // of blocks and warps: 0 as numbered, else drawn from this seed
  uint32_t lost = 0;   // blocks that never run, to see what becomes of a launch that is cut off
};

// Accesses of one kind by full warps, and the 32-byte sectors that they touched: all together, and the most of one.
struct Accesses {
  uint64_t requests = 0, sectors = 0, most = 0;
};

// What has run so far, by kernel.
struct Counts {
  uint64_t launches = 0, early = 0, blocks = 0;
  uint64_t instructions = 0;                 // of warps
  std::map<std::string, Accesses> accesses;  // by kind and bytes of a thread: "ld.global.16"
};
std::map<std::string, Counts>& counts();

// Runs a kernel to its end. `name` is a part of its name. Throws Error.
void run(const Module& module, const std::string& name, const Launch& launch, const std::vector<Argument>& arguments);

}  // namespace fusedopt::ptx
