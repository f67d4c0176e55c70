// One element to and from the 16-bit dtypes, in portable arithmetic and, in device code, by instruction.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "rules/common.h"

namespace fusedopt {

FUSEDOPT_HD float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

FUSEDOPT_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

FUSEDOPT_HD float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

FUSEDOPT_HD uint16_t float_to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  uint32_t bits = float_to_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value != value ? uint16_t(0x7fc0) : uint16_t(rounded);
#endif
}

FUSEDOPT_HD float fp16_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#else
  uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) {  // NaN is made quiet, as the instruction does
    return bits_to_float(sign | 0x7f800000u | (rest > 0x7c00u ? 0x400000u : 0u) | ((rest & 0x3ffu) << 13));
  }
  // Scaling by 2^112 rebiases the exponent and normalizes subnormals alike.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

FUSEDOPT_HD uint16_t float_to_fp16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
  if (rest >= 0x47800000u) return uint16_t(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // Subnormal result: adding 0.5 lines the mantissa up with fp16's, and the addition rounds to nearest even.
    return uint16_t(sign | (float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000u));
  }
  rest += 0xc8000fffu + ((rest >> 13) & 1u);
  return uint16_t(sign | (rest >> 13));
#endif
}

// double -> float rounded to odd, so that a second rounding to 16 bits is the same as rounding once.
FUSEDOPT_HD float round_to_odd(double value) {
  float nearest = float(value);
  if (double(nearest) == value || value != value) return nearest;
  uint32_t bits = float_to_bits(nearest);
  double magnitude = value < 0 ? -value : value, found = bits_to_float(bits & 0x7fffffffu);
  if (found > magnitude) bits -= 1;
  return bits_to_float(bits | 1u);
}

// What is rounded to 16 bits next.
FUSEDOPT_HD float narrow(float value) { return value; }
FUSEDOPT_HD float narrow(double value) { return round_to_odd(value); }

}  // namespace fusedopt
