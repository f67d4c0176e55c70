// Calls of the CUDA runtime that are checked, and the time of kernels without the host's part in it.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace fusedopt::bandwidth {

#define FUSEDOPT_CHECK_CUDA(call) ::fusedopt::bandwidth::check_cuda((call), #call, __FILE__, __LINE__)

inline void check_cuda(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s:%d: %s: %s (%s)\n", file, line, call, cudaGetErrorString(status), cudaGetErrorName(status));
  std::exit(1);
}

// Device memory that is freed with its owner.
class Memory {
 public:
  explicit Memory(size_t bytes) { FUSEDOPT_CHECK_CUDA(cudaMalloc(&address_, bytes)); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(address_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(address_);
  }

 private:
  void* address_ = nullptr;
};

__global__ void wait_kernel(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}

// Adds up what it reads, and writes next to nothing.
__global__ void read_kernel(const float4* from, size_t count, float* result) {
  constexpr int kUnroll = 8;
  const size_t first = blockIdx.x * size_t(blockDim.x) * kUnroll + threadIdx.x;
  float4 x[kUnroll];
  float sum = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const size_t at = first + u * blockDim.x;
    x[u] = at < count ? from[at] : make_float4(0, 0, 0, 0);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) sum += x[u].x + x[u].y + x[u].z + x[u].w;
  if (sum == 12345.678f) *result = sum;  // never, but the compiler does not know
}

inline void launch_read(const void* from, size_t bytes, float* result, cudaStream_t stream) {
  constexpr int kThreads = 256, kPerBlock = kThreads * 8;
  const size_t count = bytes / sizeof(float4);
  const auto blocks = static_cast<unsigned>((count + kPerBlock - 1) / kPerBlock);
  read_kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const float4*>(from), count, result);
}

// Times work on an otherwise idle stream. The device first waits for a while, and then reads memory that evicts all
// else from its L2 cache without leaving lines to write back; meanwhile the host puts the work into the queue. If it
// was not done when the device came to the work, which the first event tells, the run is repeated with a longer wait.
class Timer {
 public:
  Timer(cudaStream_t stream, size_t cache_bytes)
      : stream_(stream), flush_bytes_(std::max<size_t>(2 * cache_bytes, 1 << 20)), flush_(flush_bytes_), result_(64) {
    FUSEDOPT_CHECK_CUDA(cudaMemset(flush_.as<void>(), 0, flush_bytes_));
    FUSEDOPT_CHECK_CUDA(cudaEventCreate(&begin_));
    FUSEDOPT_CHECK_CUDA(cudaEventCreate(&end_));
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  // The median of some runs, after a few that do not count.
  template <class Work>
  double milliseconds(const Work& enqueue, int runs) {
    constexpr int kWarmUp = 3;
    std::vector<float> times;
    for (int run = 0; run < kWarmUp + runs; ++run) {
      const float time = once(enqueue);
      if (run >= kWarmUp) times.push_back(time);
    }
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
  }

 private:
  template <class Work>
  float once(const Work& enqueue) {
    constexpr long long kMostCycles = 200'000'000;
    for (;; wait_cycles_ *= 2) {
      wait_kernel<<<1, 1, 0, stream_>>>(wait_cycles_);
      launch_read(flush_.as<void>(), flush_bytes_, result_.as<float>(), stream_);
      FUSEDOPT_CHECK_CUDA(cudaEventRecord(begin_, stream_));
      enqueue();
      FUSEDOPT_CHECK_CUDA(cudaEventRecord(end_, stream_));
      const cudaError_t reached = cudaEventQuery(begin_);
      if (reached != cudaErrorNotReady) FUSEDOPT_CHECK_CUDA(reached);
      FUSEDOPT_CHECK_CUDA(cudaEventSynchronize(end_));
      FUSEDOPT_CHECK_CUDA(cudaGetLastError());
      if (reached == cudaErrorNotReady) break;
      if (wait_cycles_ > kMostCycles) {
        std::fprintf(stderr, "the host does not get the launches into the queue in time\n");
        std::exit(1);
      }
    }
    float milliseconds = 0;
    FUSEDOPT_CHECK_CUDA(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds;
  }

  cudaStream_t stream_;
  size_t flush_bytes_;
  Memory flush_, result_;
  cudaEvent_t begin_{}, end_{};
  long long wait_cycles_ = 500'000;
};

}  // namespace fusedopt::bandwidth
