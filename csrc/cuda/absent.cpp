// Stands in for the CUDA sources in a build without them.
#include "device.h"
#include "launchers.h"

namespace fusedopt::cuda {

std::optional<std::string> built_with() { return std::nullopt; }
std::string architectures() { return ""; }
std::optional<std::string> problem() { return "fusedopt was built without CUDA"; }
std::optional<std::string> problem_on(int) { return problem(); }
const Launcher* gpu_launcher() { return nullptr; }

}  // namespace fusedopt::cuda
