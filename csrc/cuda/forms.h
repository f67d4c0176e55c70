// Columns in any form and layout, a few neighbouring elements of each at a time, as bits in registers.
//
// The elements of a column are kept as they lie in memory, the first one lowest, in as many words as the widest take:
// what they mean is found out once all columns are loaded.
#pragma once
#include "../storage.h"
#include "access.h"

namespace fusedopt::cuda::FUSEDOPT_TARGET {

// Some neighbours, kCount at a time, from element `first` of a chunk; `left` is how many of them there are, or fewer
// than none beyond the chunk's end.
struct Span {
  int64_t offset;  // of the chunk in its row
  uint32_t first;
  int left;

  __device__ __forceinline__ int64_t place(const Layout* layout, int k) const {
    return layout ? place_of<true>(layout, offset + first + static_cast<uint32_t>(k))
                  : first + static_cast<uint32_t>(k);
  }
};

// A double as two words.
__device__ __forceinline__ double join_words(uint32_t low, uint32_t high) {
  const uint64_t bits = low | static_cast<uint64_t>(high) << 32;
  double value;
  __builtin_memcpy(&value, &bits, 8);
  return value;
}

__device__ __forceinline__ void split_words(double value, uint32_t& low, uint32_t& high) {
  uint64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
}

// Loads and stores of kCount elements, of 1 << shift bytes, of a flat column in one access each.
template <int kCount>
__device__ __forceinline__ void load_whole(uint32_t (&raw)[kCount], const char* data, unsigned shift, uint32_t first) {
  static_assert(kCount == 4);
  const char* from = data + (first << shift);
  if (shift == 2) {
    load_words<4>(raw, from, 16);
  } else if (shift == 1) {
    load_words<2>(raw, from, 16);
  } else {
    load_words<1>(raw, from, 16);
  }
}

template <int kCount>
__device__ __forceinline__ void store_whole(char* data, const uint32_t (&raw)[kCount], unsigned shift, uint32_t first) {
  static_assert(kCount == 4);
  char* to = data + (first << shift);
  if (shift == 2) {
    store_words<4>(to, raw, 16);
  } else if (shift == 1) {
    store_words<2>(to, raw, 16);
  } else {
    store_words<1>(to, raw, 16);
  }
}

// The same of two elements one by one, whatever their layout. Those beyond the chunk's end are zeros. Where float is
// calculated in, a double is held as one.
template <class T, int kWords>
__device__ __forceinline__ void load_single(uint32_t (&raw)[kWords], const char* data, const Layout* layout,
                                            DType dtype, const Span& span) {
  static_assert(kWords == static_cast<int>(sizeof(T)) / 2);
#pragma unroll
  for (int i = 0; i < kWords; ++i) raw[i] = 0;
#pragma unroll 1
  for (int k = (span.left < 2 ? span.left : 2) - 1; k >= 0; --k) {  // the last first: it is moved up by the other
    const int64_t at = span.place(layout, k);
    if (dtype == DType::kFloat64) {
      const double value = reinterpret_cast<const double*>(data)[at];
      if constexpr (sizeof(T) == 8) {
        raw[2] = raw[0], raw[3] = raw[1];
        split_words(value, raw[0], raw[1]);
      } else {
        raw[1] = raw[0], raw[0] = float_to_bits(static_cast<float>(value));
      }
    } else if (dtype == DType::kFloat32) {
      raw[1] = raw[0], raw[0] = reinterpret_cast<const uint32_t*>(data)[at];
    } else if (element_size(dtype) == 2) {
      raw[0] = raw[0] << 16 | reinterpret_cast<const uint16_t*>(data)[at];
    } else {
      raw[0] = raw[0] << 8 | reinterpret_cast<const uint8_t*>(data)[at];
    }
  }
}

template <class T, int kWords>
__device__ __forceinline__ void store_single(char* data, uint32_t (&raw)[kWords], const Layout* layout, DType dtype,
                                             const Span& span) {
  static_assert(kWords == static_cast<int>(sizeof(T)) / 2);
#pragma unroll 1
  for (int k = 0; k < 2 && k < span.left; ++k) {
    const int64_t at = span.place(layout, k);
    if (dtype == DType::kFloat64) {
      double value;
      if constexpr (sizeof(T) == 8) {
        value = join_words(raw[0], raw[1]);
        raw[0] = raw[2], raw[1] = raw[3];
      } else {
        value = bits_to_float(raw[0]);
        raw[0] = raw[1];
      }
      reinterpret_cast<double*>(data)[at] = value;
    } else if (dtype == DType::kFloat32) {
      reinterpret_cast<uint32_t*>(data)[at] = raw[0];
      raw[0] = raw[1];
    } else if (element_size(dtype) == 2) {
      reinterpret_cast<uint16_t*>(data)[at] = static_cast<uint16_t>(raw[0]);
      raw[0] >>= 16;
    } else {
      reinterpret_cast<uint8_t*>(data)[at] = static_cast<uint8_t>(raw[0]);
      raw[0] >>= 8;
    }
  }
}

// The k-th 8 or 16 bits.
__device__ __forceinline__ uint32_t byte_of(uint32_t word, int k) { return word >> 8 * k & 0xffu; }
__device__ __forceinline__ uint32_t half_of(const uint32_t* words, int k) {
  return words[k / 2] >> 16 * (k % 2) & 0xffffu;
}

template <int kWords, int kCount>
__device__ __forceinline__ void put_halves(uint32_t (&raw)[kWords], const uint32_t (&half)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; k += 2) raw[k / 2] = half[k] | half[k + 1] << 16;
}

// --- Plain numbers -----------------------------------------------------------------------------------------------

template <int kWords, int kCount>
__device__ __forceinline__ void decode_plain(float (&x)[kCount], const uint32_t (&raw)[kWords], DType dtype) {
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat16) {
    unpack_halves(x, raw, dtype);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = bits_to_float(raw[k]);
  }
}

template <int kWords, int kCount>
__device__ __forceinline__ void decode_plain(double (&x)[kCount], const uint32_t (&raw)[kWords], DType dtype) {
  if (dtype == DType::kFloat64) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = join_words(raw[2 * k], raw[2 * k + 1]);
  } else {
    float narrow[kCount];
    decode_plain(narrow, raw, dtype);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = narrow[k];
  }
}

// To nearest even.
template <int kWords, int kCount>
__device__ __forceinline__ void encode_plain(uint32_t (&raw)[kWords], const float (&x)[kCount], DType dtype) {
  if (dtype == DType::kBFloat16 || dtype == DType::kFloat16) {
    pack_halves(raw, x, dtype);
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) raw[k] = float_to_bits(x[k]);
  }
}

template <int kWords, int kCount>
__device__ __forceinline__ void encode_plain(uint32_t (&raw)[kWords], const double (&x)[kCount], DType dtype) {
  if (dtype == DType::kFloat64) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) split_words(x[k], raw[2 * k], raw[2 * k + 1]);
  } else {
    float narrowed[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      narrowed[k] = dtype == DType::kFloat32 ? static_cast<float>(x[k]) : narrow(x[k]);
    }
    encode_plain(raw, narrowed, dtype);
  }
}

// By chance.
template <class T, int kWords, int kCount>
__device__ __forceinline__ void encode_by_chance(uint32_t (&raw)[kWords], const T (&x)[kCount], DType dtype,
                                                 const uint32_t (&random)[2]) {
  uint32_t half[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    half[k] = dtype == DType::kBFloat16 ? float_to_bf16(narrow(x[k]), half_of(random, k))
                                        : float_to_fp16(narrow(x[k]), half_of(random, k));
  }
  put_halves(raw, half);
}

// --- Masters -----------------------------------------------------------------------------------------------------

// The values of parameters, which `x` has, and what their masters have of them.
template <int kWords, int kCount>
__device__ __forceinline__ void join_master(float (&x)[kCount], const uint32_t (&param)[kWords],
                                            const uint32_t (&master)[kWords], DType dtype, DType param_dtype) {
  if (dtype == DType::kLow16) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int32_t rest = static_cast<int16_t>(half_of(master, k));
      x[k] = join_pieces(float_to_bits(x[k]), rest);
    }
  } else if (dtype == DType::kLow8) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const int32_t rest = static_cast<int8_t>(byte_of(master[0], k));
      x[k] = join_pieces(float_to_bits(x[k]), rest * 256);
    }
  } else {
    // Where the parameter is not the master's rounding, somebody has changed it, and it is what counts.
    float exact[kCount];
    uint32_t rounded[kCount / 2];
    decode_plain(exact, master, DType::kFloat32);
    pack_halves(rounded, exact, param_dtype);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] = half_of(rounded, k) == half_of(param, k) ? exact[k] : x[k];
  }
}

// `x` becomes what the two pieces make.
template <int kWords, int kCount>
__device__ __forceinline__ void split_master(uint32_t (&param)[kWords], uint32_t (&master)[kWords], float (&x)[kCount],
                                             DType dtype, bool by_chance, const uint32_t (&random)[2]) {
  uint32_t bits[kCount], half[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    bits[k] = plain_bits(x[k]);
    if (dtype == DType::kLow8) {
      bits[k] = by_chance ? round_to_24(bits[k], half_of(random, k)) : round_to_24(bits[k]);
    }
    x[k] = bits_to_float(bits[k]);
    half[k] = high_piece(bits[k]);
  }
  put_halves(param, half);
  if (dtype == DType::kLow8) {
    master[0] = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) master[0] |= byte_of(bits[k], 1) << 8 * k;
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) half[k] = bits[k] & 0xffffu;
    put_halves(master, half);
  }
}

// --- Roots and codes ---------------------------------------------------------------------------------------------

// Threads that share a block of codes; they are neighbours in a warp.
template <int kCount>
constexpr int kCodeThreads = static_cast<int>(kCodeBlock) / kCount;

// A state. The scale of codes is in the last word.
template <class T, int kWords, int kCount>
__device__ __forceinline__ void decode_state(T (&x)[kCount], const uint32_t (&raw)[kWords], DType dtype) {
  if (is_coded(dtype)) {
    const float scale = bf16_to_float(static_cast<uint16_t>(raw[kWords - 1]));
    if (dtype == DType::kSigned8) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = decode_signed(static_cast<uint8_t>(byte_of(raw[0], k)), scale);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = decode_unsigned(static_cast<uint8_t>(byte_of(raw[0], k)), scale);
    }
  } else if (dtype == DType::kRoot16) {
    decode_plain(x, raw, DType::kFloat16);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x[k] *= x[k];
  } else {
    decode_plain(x, raw, dtype);
  }
}

template <class T, int kWords, int kCount>
__device__ __forceinline__ void encode_root16(uint32_t (&raw)[kWords], const T (&x)[kCount], bool by_chance,
                                              const uint32_t (&random)[2]) {
  uint32_t half[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float root = narrow(square_root(x[k]));
    half[k] = by_chance ? root_to_fp16(root, half_of(random, k)) : root_to_fp16(root);
  }
  put_halves(raw, half);
}

// Codes, and what they are scaled by. Called by all threads of a warp, of which
// kCodeThreads neighbours share a block. Rounding to nearest is by chance with half of what is random.
template <class Code, class T, int kWords, int kCount>
__device__ __forceinline__ void encode_codes(uint32_t (&raw)[kWords], const T (&x)[kCount], const uint32_t (&random)[2],
                                             int left) {
  constexpr bool kIsSigned = Code::kMost == SignedCode::kMost;
  float value[kCount];
  uint32_t most = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    value[k] = static_cast<float>(x[k]);
    // As integers, floats without a sign have the order of their bits. Nothing is the largest beyond the end.
    const uint32_t bits = k < left ? float_to_bits(value[k]) & 0x7fffffffu : 0u;
    most = bits > most ? bits : most;
  }
#pragma unroll
  for (int distance = kCodeThreads<kCount> / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, most, distance);
    most = other > most ? other : most;
  }
  const uint16_t scale = scale_of<Code>(bits_to_float(most));
  const float inverse = inverse_scale(scale);
  raw[0] = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const uint32_t rounding = code_rounding<Code>(half_of(random, k));
    const uint32_t code =
        kIsSigned ? encode_signed(value[k], inverse, rounding) : encode_unsigned(value[k], inverse, rounding);
    raw[0] |= code << 8 * k;
  }
  raw[kWords - 1] = scale;
}

}  // namespace fusedopt::cuda::FUSEDOPT_TARGET
