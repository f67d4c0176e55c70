// What every rule header needs: one spelling of "inline on host and device", and maths without library headers.
//
// A rule header holds one optimizer's arithmetic and knows nothing of chunks, threads, dtypes or memory. It is compiled
// into one translation unit per CPU instruction set, so everything here is force-inlined and free of STL and torch
// headers: an out-of-line copy of an inline function could carry the wrong instruction set into the others.
#pragma once

#if defined(__CUDACC__)
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif

namespace fusedopt {

// Torch's epsilon in min(1, max_norm / (norm + 1e-6)); fusedopt.rules.CLIP_EPS is tested equal.
constexpr double kClipEps = 1e-6;

// Columns of state a rule may carry, and hyperparameters of a param group as doubles.
constexpr int kMaxStates = 3;
constexpr int kMaxHyper = 8;

// How a rule reads a param group: `key` fills one slot with a number (arity 1) or with the truth of a flag, or `arity`
// consecutive slots with a tuple of numbers.
struct HyperKey {
  static constexpr int kFlag = 0;
  const char* key;
  int slot;
  int arity;
};

#if defined(__CUDA_ARCH__)
FUSEDOPT_HD float square_root(float x) { return __fsqrt_rn(x); }
FUSEDOPT_HD double square_root(double x) { return __dsqrt_rn(x); }
FUSEDOPT_HD double power(double base, double exponent) { return pow(base, exponent); }
#else
FUSEDOPT_HD float square_root(float x) { return __builtin_sqrtf(x); }
FUSEDOPT_HD double square_root(double x) { return __builtin_sqrt(x); }
FUSEDOPT_HD double power(double base, double exponent) { return __builtin_pow(base, exponent); }
#endif

// max(a, b) that hands NaN on from either side, as torch.maximum.
template <class T>
FUSEDOPT_HD T nan_max(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// Clamp to [-bound, bound]: NaN stays NaN, +-inf becomes +-bound; an infinite bound changes nothing.
template <class T>
FUSEDOPT_HD T clamp(T x, T bound) {
  x = -bound > x ? -bound : x;
  return bound < x ? bound : x;
}
#if defined(__CUDA_ARCH__)
// The same in two instructions, not four.
FUSEDOPT_HD float clamp(float x, float bound) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(-bound));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(bound));
  return x;
}
#endif

// min(1, max_norm / (norm + eps)). A NaN norm gives NaN (std::min and fmin would give 1); an infinite bound only
// reports, so an infinite norm then gives 1.
FUSEDOPT_HD double clip_coefficient(double norm, double max_norm) {
  if (max_norm > 1.7976931348623157e308) return norm != norm ? norm : 1.0;
  double coefficient = max_norm / (norm + kClipEps);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

}  // namespace fusedopt
