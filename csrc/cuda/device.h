// What the host knows of CUDA without torch: whether this build has it and whether the machine can run it.
#pragma once
#include <optional>
#include <string>

#include "../export.h"

namespace fusedopt::cuda {

// The CUDA version of the build, or nothing when it was built without.
FUSEDOPT_EXPORT std::optional<std::string> built_with();
// The architectures of the build, such as "sm_80, sm_90"; empty when it was built without.
FUSEDOPT_EXPORT std::string architectures();
// Why no CUDA device can be used, or nothing when one can.
FUSEDOPT_EXPORT std::optional<std::string> problem();
// Why the kernels cannot run on this device, or nothing when they can. Leaves it the current one.
FUSEDOPT_EXPORT std::optional<std::string> problem_on(int device);

}  // namespace fusedopt::cuda
