#include "device.h"

#include <map>
#include <mutex>

#include "portable.h"

namespace fusedopt::cuda {
namespace gpu {

void load_carried();
void load_statistics();
void load_update();
void load_upload();
void upload(const Place&, void* to, const void* from, size_t bytes);
void map_chunks(const Place&, const Tables&);
void statistics(const Place&, const StatisticsArguments&);
void conclude(const Place&, const StatisticsArguments&, const double* totals, int count);
void update(const Place&, const UpdateArguments&, const Row& like, bool early);

namespace {

void load(int device) {
  use(device);
  load_statistics();
  load_update();
  load_carried();
  load_upload();
}

bool capturing(const Place& place) {
  use(place.device);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(place.stream), &status), "ask whether a stream captures");
  return status != cudaStreamCaptureStatusNone;
}

// Why the kernels do not load on a device that is there, or nothing.
std::optional<std::string> find_problem_on(int device) {
  try {
    use(device);
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, device), "read the device's properties");
    const int capability = properties.major * 10 + properties.minor;
    if (capability < 80) {
      return "the device has compute capability " + std::to_string(properties.major) + "." +
             std::to_string(properties.minor) + "; 8.0 or higher is needed";
    }
    cudaFuncAttributes attributes{};
    const cudaError_t status = probe(&attributes);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
        status == cudaErrorUnsupportedPtxVersion) {
      cudaGetLastError();
      return "this build has kernels for " + architectures() + ", and none that runs on sm_" +
             std::to_string(capability) + "; build with FUSEDOPT_CUDA_ARCHS=" + std::to_string(capability);
    }
    check(status, "load a kernel");
    load(device);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return std::nullopt;
}

}  // namespace
}  // namespace gpu

std::optional<std::string> built_with() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::string architectures() { return FUSEDOPT_CUDA_ARCHS; }

std::optional<std::string> problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return std::string(cudaGetErrorString(status));
  }
  if (devices == 0) return "no CUDA device";
  return std::nullopt;
}

std::optional<std::string> problem_on(int device) {
  static std::mutex busy;
  static std::map<int, std::optional<std::string>> known;
  if (auto reason = problem()) return reason;
  const std::lock_guard<std::mutex> lock(busy);
  auto found = known.find(device);
  if (found == known.end()) found = known.emplace(device, gpu::find_problem_on(device)).first;
  return found->second;
}

const Launcher* gpu_launcher() {
  static const Launcher launcher = {gpu::capturing,  nullptr,       gpu::upload, gpu::map_chunks,
                                    gpu::statistics, gpu::conclude, gpu::update};
  return &launcher;
}

}  // namespace fusedopt::cuda
