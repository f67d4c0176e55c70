// The CUDA kernels as the executor launches them.
#pragma once
#include "../device/launch.h"
#include "../export.h"

namespace fusedopt::cuda {

using namespace fusedopt::device;

constexpr int kThreads = 256;  // of a block

// The kernels on the GPU, or null in a build without CUDA.
FUSEDOPT_EXPORT const Launcher* gpu_launcher();

// The same source as host code, for tests without a GPU, or null in a build without it. See Note [Emulation].
FUSEDOPT_EXPORT const Launcher* emulated_launcher();

}  // namespace fusedopt::cuda
