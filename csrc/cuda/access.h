// Loads and stores of columns on a device: up to 16 bytes at a time where columns are flat, else one element.
//
// Note [Dtypes at run time]
// A kernel per combination of dtypes would be hundreds. A step is bound by memory by a wide margin: an H200 has time
// for about 190 instructions per element of AdamW in float32, and for half as many in 16 bits. The loops take 47 where
// all columns are float32, 49 where all are bfloat16 or all float16, and 60 to 65 where they are mixed (SASS of sm_90;
// tests/test_ptxas.py counts). So kernels take the dtype of each column from its row. Threads of a block always agree
// on it. What matters is that no load waits for another: all columns are loaded as raw bits first, and converted after.
#pragma once
#include "portable.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {

// The widest access that an address allows, up to 16 bytes.
__device__ __forceinline__ unsigned alignment_of(const void* address) {
  const unsigned low = static_cast<unsigned>(reinterpret_cast<uintptr_t>(address)) | 16u;
  return low & (0u - low);
}

// 4, 8 or 16 bytes, from and to an address of any alignment >= 2.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t* to, const char* from, unsigned alignment) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if (kWords == 4 && alignment == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    to[0] = bits.x, to[1] = bits.y, to[2] = bits.z, to[3] = bits.w;
  } else if (kWords > 1 && alignment >= 8) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) {
      const uint2 bits = reinterpret_cast<const uint2*>(from)[i / 2];
      to[i] = bits.x, to[i + 1] = bits.y;
    }
  } else if (alignment >= 4) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = reinterpret_cast<const uint32_t*>(from)[i];
  } else {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < kWords; ++i) to[i] = halves[2 * i] | static_cast<uint32_t>(halves[2 * i + 1]) << 16;
  }
}

template <int kWords>
__device__ __forceinline__ void store_words(char* to, const uint32_t* from, unsigned alignment) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if (kWords == 4 && alignment == 16) {
    *reinterpret_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  } else if (kWords > 1 && alignment >= 8) {
#pragma unroll
    for (int i = 0; i < kWords; i += 2) reinterpret_cast<uint2*>(to)[i / 2] = make_uint2(from[i], from[i + 1]);
  } else if (alignment >= 4) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(to)[i] = from[i];
  } else {
    uint16_t* halves = reinterpret_cast<uint16_t*>(to);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      halves[2 * i] = static_cast<uint16_t>(from[i]);
      halves[2 * i + 1] = static_cast<uint16_t>(from[i] >> 16);
    }
  }
}

// The 16-bit elements in some words, as floats and back. What kind they are is decided once for all of them.
template <int kCount>
__device__ __forceinline__ void unpack_halves(float (&to)[kCount], const uint32_t* from, DType dtype) {
  auto half = [&](int i) { return static_cast<uint16_t>(from[i / 2] >> 16 * (i % 2)); };
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = bf16_to_float(half(i));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = fp16_to_float(half(i));
  }
}

template <int kCount>
__device__ __forceinline__ void pack_halves(uint32_t* to, const float (&from)[kCount], DType dtype) {
  static_assert(kCount % 2 == 0);
  if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      to[i / 2] = float_to_bf16(from[i]) | static_cast<uint32_t>(float_to_bf16(from[i + 1])) << 16;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      to[i / 2] = float_to_fp16(from[i]) | static_cast<uint32_t>(float_to_fp16(from[i + 1])) << 16;
    }
  }
}

// One element, of any dtype.
template <class T>
__device__ __forceinline__ T load_element(const char* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return T(reinterpret_cast<const float*>(data)[index]);
    case DType::kFloat64:
      return T(reinterpret_cast<const double*>(data)[index]);
    case DType::kBFloat16:
      return T(bf16_to_float(reinterpret_cast<const uint16_t*>(data)[index]));
    default:
      return T(fp16_to_float(reinterpret_cast<const uint16_t*>(data)[index]));
  }
}

template <class T>
__device__ __forceinline__ void store_element(char* data, int64_t index, DType dtype, T value) {
  switch (dtype) {
    case DType::kFloat32:
      reinterpret_cast<float*>(data)[index] = float(value);
      return;
    case DType::kFloat64:
      reinterpret_cast<double*>(data)[index] = double(value);
      return;
    case DType::kBFloat16:
      reinterpret_cast<uint16_t*>(data)[index] = float_to_bf16(narrow(value));
      return;
    default:
      reinterpret_cast<uint16_t*>(data)[index] = float_to_fp16(narrow(value));
  }
}

// A quotient bit by bit, in few registers.
__device__ __forceinline__ int64_t long_quotient(int64_t dividend, int64_t divisor) {
  uint64_t rest = 0, bits = static_cast<uint64_t>(dividend);
#pragma unroll 1
  for (int i = 0; i < 64; ++i) {
    rest = rest << 1 | bits >> 63;
    bits <<= 1;
    if (rest < static_cast<uint64_t>(divisor)) continue;
    rest -= static_cast<uint64_t>(divisor);
    bits |= 1;
  }
  return static_cast<int64_t>(bits);
}

// Where the element with canonical number `index` lies, in elements; see Note [Canonical order]. With kFewRegisters
// those beyond 2^32 take long, but nothing is called.
template <bool kFewRegisters = false>
__device__ __forceinline__ int64_t place_of(const Layout* layout, int64_t index) {
  if (!layout) return index;
  int64_t at = 0;
#pragma unroll 1
  for (int d = layout->dims - 1; d > 0; --d) {
    const int64_t size = layout->size[d];
    int64_t rest;
    if (((index | size) >> 32) == 0) {  // a 64-bit division takes several times as long
      rest = static_cast<uint32_t>(index) / static_cast<uint32_t>(size);
    } else {
      rest = kFewRegisters ? long_quotient(index, size) : index / size;
    }
    at += (index - rest * size) * layout->stride[d];
    index = rest;
  }
  return at + index * layout->stride[0];
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
