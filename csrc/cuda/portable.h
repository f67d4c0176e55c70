// What the kernel sources include: CUDA's own names under nvcc, the emulator's in a host build of the same sources.
#pragma once
#include "../convert.h"
#include "launchers.h"

#if defined(__CUDACC__)

#include <atomic>
#include <stdexcept>

#define FUSEDOPT_TARGET gpu
#if CUDART_VERSION >= 12010
#define FUSEDOPT_LARGE_ARGUMENTS
#endif

namespace fusedopt::cuda::gpu {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string("CUDA failed to ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Makes a device the current one. Whoever calls the launcher has torch restore what was before: to set a device that
// has no context yet would make one there.
inline void use(int device) {
  int now = 0;
  check(cudaGetDevice(&now), "find the current device");
  if (now != device) check(cudaSetDevice(device), "change the device");
}

// Loads a kernel now; else its first launch does, which a capture does not allow.
template <class... Parameters>
void load_kernel(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "load a kernel");
}

// The same for one kernel, to see whether the build has any for this device.
cudaError_t probe(cudaFuncAttributes* attributes);

// What a device's double arithmetic is like: the one that runs, whatever the code was compiled for.
inline bool slow_double(int device) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  std::atomic<signed char>& answer = known[device % kDevices];
  if (!answer) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "read a device's capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "read a device's capability");
    answer = has_slow_double(10 * major + minor) ? 1 : -1;
  }
  return answer > 0;
}

// Whether a kernel may start early on a device: whether the code that runs there waits, as that for sm_90 and later
// does. What counts is the architecture it was compiled for, since a driver may have made its code from older PTX.
template <class... Parameters>
bool starts_early(void (*kernel)(Parameters...), int device) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet. (Kernels with these parameters are one file's.)
  std::atomic<signed char>& answer = known[device % kDevices];
  if (!answer) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "read a kernel's attributes");
    answer = attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return answer > 0;
}

// With `early`, blocks may start before the kernel launched before is through; they call wait_for_previous_kernel().
template <class... Parameters>
void launch(void (*kernel)(Parameters...), uint32_t blocks, const Place& place, bool early,
            const Parameters&... arguments) {
  use(place.device);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &attribute;
  config.numAttrs = early && starts_early(kernel, place.device) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch a kernel");
}

// Whether the driver takes launches with up to 32764 bytes of arguments, and not just 4 KB.
inline bool takes_large_arguments() {
#if defined(FUSEDOPT_LARGE_ARGUMENTS)
  static const bool takes = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return takes;
#else
  return false;
#endif
}

// Lets the next kernel's blocks start where there is room, and waits for the kernel before and all it wrote.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

// Adds 1 to a counter that wraps at `count`, and tells what it was. What any block did before its own call is visible
// after this one.
__device__ __forceinline__ uint32_t draw_ticket(uint32_t* counter, uint32_t count) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
               : "memory");
  return before;
}

// A block's shared memory, one object per kernel; not initialized.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ T storage;
  return storage;
}

// Tells the compiler, which cannot know it of an address that was in a table.
template <class T>
__device__ __forceinline__ T* in_global_memory(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// sum + x * y for a product that is exact, so that it does not matter that it is one instruction.
__device__ __forceinline__ double add_exact_product(double sum, double x, double y) { return __fma_rn(x, y, sum); }

// Makes the compiler read shared memory again instead of keeping it in registers.
__device__ __forceinline__ void forget_memory() { asm volatile("" : : : "memory"); }

}  // namespace fusedopt::cuda::gpu

#else
#define FUSEDOPT_TARGET emulated
#include "emulator/emulator.h"
#endif
