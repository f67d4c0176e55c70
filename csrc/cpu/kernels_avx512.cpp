// AVX-512 F, BW, DQ and VL. Compiled with these instructions enabled, and empty on another architecture.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FUSEDOPT_ISA_NAME "avx512"
#define FUSEDOPT_LANES 4
#define FUSEDOPT_HAS_F16C
#include "kernels.inl.h"

namespace fusedopt::cpu {
const Kernels* kernels_avx512() { return &kTable; }
}  // namespace fusedopt::cpu
#else
namespace fusedopt::cpu {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace fusedopt::cpu
#endif
