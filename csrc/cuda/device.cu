#include "device.h"

#include <cuda_runtime_api.h>

namespace fusedopt::cuda {

std::optional<std::string> built_with() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::optional<std::string> problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) return std::string(cudaGetErrorString(status));
  if (devices == 0) return "no CUDA device";
  return std::nullopt;
}

}  // namespace fusedopt::cuda
