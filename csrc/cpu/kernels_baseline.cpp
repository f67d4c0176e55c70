// The instruction set every processor of this architecture has.
#define FUSEDOPT_ISA_NAME "baseline"
#define FUSEDOPT_LANES 2
#include "kernels.inl.h"

namespace fusedopt::cpu {
const Kernels* kernels_baseline() { return &kTable; }
}  // namespace fusedopt::cpu
