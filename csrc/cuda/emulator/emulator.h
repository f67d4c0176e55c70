// CUDA's names for a host build of the kernel sources.
//
// Note [Emulation]
// A machine without a GPU cannot run the kernels, but it can run their source: compiled by the C++ compiler with the
// names below, each block one after the other, each of its threads on a stack of its own, and switching between them at
// barriers. So every index, every order of additions and every rule is tested where the tests run, under the sanitizers
// too. It goes further than a GPU in three ways: shared memory is full of NaN when a block starts, blocks and threads
// can be run in any order, and a barrier that some threads never reach is an error. It does not show data races within
// a warp's step, memory that another kind of processor reorders, or speed.
#pragma once
#include <math.h>
#include <string.h>

#include <string>

#include "../../ptx/machine.h"
#include "../launchers.h"
#include "control.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define FUSEDOPT_TARGET emulated
#define FUSEDOPT_LARGE_ARGUMENTS

namespace fusedopt::cuda::emulated {

struct Dimension {
  uint32_t x;
};
extern Dimension threadIdx, blockIdx, gridDim;  // of the thread that is running

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

// Both wait for all threads, of the block or of the warp, and return what their `combine` makes of all values.
uint64_t meet_block(uint64_t value, uint64_t (*combine)(uint64_t, uint64_t));
const uint64_t* meet_warp(uint64_t value);  // the values of all lanes, until the warp meets again

inline void __syncthreads() {
  meet_block(0, [](uint64_t a, uint64_t) { return a; });
}
inline int __syncthreads_or(int value) {
  return meet_block(value != 0, [](uint64_t a, uint64_t b) { return a | b; }) != 0;
}
inline double __shfl_down_sync(unsigned, double value, int distance) {
  uint64_t bits;
  memcpy(&bits, &value, 8);
  const uint64_t* values = meet_warp(bits);
  const uint32_t lane = threadIdx.x % 32, from = lane + static_cast<uint32_t>(distance);
  memcpy(&value, &values[from < 32 ? from : lane], 8);
  return value;
}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t value, int distance) {
  return static_cast<uint32_t>(meet_warp(value)[threadIdx.x % 32 ^ static_cast<uint32_t>(distance)]);
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const uint64_t* values = meet_warp(value);
  for (int lane = 0; lane < 32; ++lane) value |= static_cast<unsigned>(values[lane]);
  return value;
}
inline uint32_t draw_ticket(uint32_t* counter, uint32_t count) {
  const uint32_t before = *counter;
  *counter = before >= count - 1 ? 0 : before + 1;
  return before;
}
inline uint32_t atomicOr(uint32_t* to, uint32_t value) {
  const uint32_t before = *to;
  *to |= value;
  return before;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}
inline void forget_memory() {}
inline double add_exact_product(double sum, double x, double y) { return sum + x * y; }
inline bool takes_large_arguments() { return true; }
template <class T>
T* in_global_memory(T* address) {
  return address;
}

inline bool slow_double(int) { return settings().slow_double; }

void* shared_memory(size_t bytes);
template <class T>
T& block_shared() {
  return *static_cast<T*>(shared_memory(sizeof(T)));
}

bool capturing(const Place&);
void run_or_record(std::function<void()> launch);
void run_blocks(uint32_t blocks, const std::function<void()>& kernel);

template <class... Parameters>
void load_kernel(void (*)(Parameters...)) {}

// Runs a kernel's PTX, which settings() hold.
void run_ptx(void* kernel, uint32_t blocks, bool early, const std::vector<ptx::Argument>& arguments);
// A part of a kernel's name in PTX that no other has.
std::string ptx_name(void* kernel);

template <class... Parameters>
void launch(void (*kernel)(Parameters...), uint32_t blocks, const Place&, bool early, const Parameters&... arguments) {
  run_or_record([=] {
    if (settings().ptx.empty()) {
      run_blocks(blocks, [&] { kernel(arguments...); });
    } else {
      run_ptx(reinterpret_cast<void*>(kernel), blocks, early, {ptx::Argument{&arguments, sizeof(arguments)}...});
    }
  });
}

}  // namespace fusedopt::cuda::emulated
