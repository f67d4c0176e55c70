// Stands in for the CUDA sources in a build without them.
#include "device.h"

namespace fusedopt::cuda {

std::optional<std::string> built_with() { return std::nullopt; }
std::optional<std::string> problem() { return "fusedopt was built without CUDA"; }

}  // namespace fusedopt::cuda
