// The kernels, as host code.
#include "../statistics.cu"
#include "../update.cu"
#include "../upload.cu"

namespace fusedopt::cuda {

const Launcher* emulated_launcher() {
  static const Launcher launcher = {
      emulated::capturing, nullptr,         emulated::upload, emulated::map_chunks, emulated::statistics,
      emulated::conclude,  emulated::update};
  return &launcher;
}

}  // namespace fusedopt::cuda
