// Stands in for the emulator in a build without it.
#include "../launchers.h"

namespace fusedopt::cuda {

const Launcher* emulated_launcher() { return nullptr; }

}  // namespace fusedopt::cuda
