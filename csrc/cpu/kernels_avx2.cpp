// AVX2 with FMA and the fp16 conversions. Compiled with these instructions enabled, and empty on another architecture.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FUSEDOPT_ISA_NAME "avx2"
#define FUSEDOPT_LANES 4
#define FUSEDOPT_HAS_F16C
#include "kernels.inl.h"

namespace fusedopt::cpu {
const Kernels* kernels_avx2() { return &kTable; }
}  // namespace fusedopt::cpu
#else
namespace fusedopt::cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace fusedopt::cpu
#endif
