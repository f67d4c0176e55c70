// What the kernel sources include: CUDA's own names under nvcc, the emulator's in a host build of the same sources.
#pragma once
#include "../convert.h"
#include "launch.h"

#if defined(__CUDACC__)

#include <atomic>
#include <stdexcept>

#define FUSEDOPT_TARGET gpu

namespace fusedopt::cuda::gpu {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string("CUDA failed to ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Makes a device the current one for a while.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "find the current device");
    if (before_ != device) check(cudaSetDevice(device), "change the device");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Loads a kernel now; else its first launch does, which a capture does not allow.
template <class... Parameters>
void load_kernel(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "load a kernel");
}

// The same for one kernel, to see whether the build has any for this device.
cudaError_t probe(cudaFuncAttributes* attributes);

// Whether kernels on a device can start early. (sm_90 and later can.)
inline bool starts_early(int device) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  std::atomic<signed char>& answer = known[device % kDevices];
  if (!answer) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "read a device's capability");
    answer = major >= 9 ? 1 : -1;
  }
  return answer > 0;
}

// With `early`, blocks may start before the kernel launched before is through; they call wait_for_previous_kernel().
template <class... Parameters>
void launch(void (*kernel)(Parameters...), uint32_t blocks, const Place& place, bool early,
            const Parameters&... arguments) {
  const OnDevice here(place.device);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &attribute;
  config.numAttrs = early && starts_early(place.device) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch a kernel");
}

// Whether the driver takes launches with up to 32764 bytes of arguments, and not just 4 KB.
inline bool takes_large_arguments() {
#if CUDART_VERSION >= 12010
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

// Whether double arithmetic is so slow that a norm is first added up, in short runs, in float.
__device__ __forceinline__ constexpr bool slow_double() {
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1030 || \
    __CUDA_ARCH__ >= 1100
  return true;
#else
  return false;
#endif
}

}  // namespace fusedopt::cuda::gpu

#else
#define FUSEDOPT_TARGET emulated
#include "emulator/emulator.h"
#endif
