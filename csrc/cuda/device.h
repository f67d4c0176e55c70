// What the host knows of CUDA without torch: whether this build has it and whether the machine can run it.
#pragma once
#include <optional>
#include <string>

namespace fusedopt::cuda {

// The CUDA version of the build, or nothing when it was built without.
std::optional<std::string> built_with();
// Why no CUDA device can be used, or nothing when one can.
std::optional<std::string> problem();

}  // namespace fusedopt::cuda
