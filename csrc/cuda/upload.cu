// Getting the tables to the device.
//
// Note [Uploads]
// What has changed in the host's tables travels as the argument of a kernel that stores it. That is ordered with the
// stream like any other kernel, needs no pinned memory that must live until a copy is through, and nothing waits. In a
// captured graph the contents are part of the graph: each replay writes the tables anew, into memory that may have
// served something else between, and nothing on the host has to outlive the capture. Most steps upload nothing, because
// torch's allocator gives gradients the addresses they had.
#include <algorithm>

#include "portable.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {
namespace {

// The classic limit of a launch's arguments is 4 KB; drivers from 12.1 on take 32764 bytes.
constexpr size_t kSmallUpload = 3840, kLargeUpload = 32000;

template <size_t kBytes>
struct Payload {
  uint4 words[kBytes / 16];
};

template <size_t kBytes>
__global__ void __launch_bounds__(kThreads)
    upload_kernel(uint4* to, uint32_t count, const __grid_constant__ Payload<kBytes> payload) {
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) to[i] = payload.words[i];
}

__global__ void __launch_bounds__(kThreads) map_kernel(const __grid_constant__ Tables tables) {
  const Row& row = tables.rows[blockIdx.x];
  const uint32_t count = chunks_of(row.numel, tables.chunk_elements);
  for (uint32_t i = threadIdx.x; i < count; i += kThreads) tables.chunks[row.first_chunk + i] = {blockIdx.x, i};
}

template <size_t kBytes>
void upload_part(const Place& place, char* to, const char* from, size_t bytes) {
  static thread_local Payload<kBytes> payload;
  __builtin_memcpy(payload.words, from, bytes);
  launch(upload_kernel<kBytes>, 1, place, false, reinterpret_cast<uint4*>(to), static_cast<uint32_t>(bytes / 16),
         payload);
}

}  // namespace

void load_upload() {
  load_kernel(upload_kernel<kSmallUpload>);
#if defined(FUSEDOPT_LARGE_ARGUMENTS)
  if (takes_large_arguments()) load_kernel(upload_kernel<kLargeUpload>);
#endif
  load_kernel(map_kernel);
}

#if defined(__CUDACC__)
cudaError_t probe(cudaFuncAttributes* attributes) { return cudaFuncGetAttributes(attributes, map_kernel); }
#endif

void upload(const Place& place, void* to, const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t left = bytes - done;
    char* const target = static_cast<char*>(to) + done;
    const char* const source = static_cast<const char*>(from) + done;
    size_t part;
    if (left <= kSmallUpload || !takes_large_arguments()) {
      upload_part<kSmallUpload>(place, target, source, part = std::min(left, kSmallUpload));
    } else {
#if defined(FUSEDOPT_LARGE_ARGUMENTS)
      upload_part<kLargeUpload>(place, target, source, part = std::min(left, kLargeUpload));
#endif
    }
    done += part;
  }
}

void map_chunks(const Place& place, const Tables& tables) {
  launch(map_kernel, tables.row_count, place, false, tables);
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
