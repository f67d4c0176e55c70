// Registers hold 64 bits; what these mean as a type, and back.
#pragma once
#include <math.h>
#include <string.h>

#include "../convert.h"
#include "module.h"

namespace fusedopt::ptx {

inline uint64_t low_bits(uint64_t value, int bytes) { return bytes == 8 ? value : value & ((1ull << 8 * bytes) - 1); }

// Cut to what the type holds.
inline uint64_t cut(uint64_t value, Type type) {
  return type.kind == Kind::kPredicate ? value & 1 : low_bits(value, type.bytes);
}

// The number in a register, as 64 bits, by the sign of its type.
inline int64_t integer(uint64_t value, Type type) {
  const int unused = 64 - 8 * type.bytes;
  if (type.kind == Kind::kSigned) return static_cast<int64_t>(value << unused) >> unused;
  return static_cast<int64_t>(low_bits(value, type.bytes));
}

inline float as_float(uint64_t bits) { return bits_to_float(static_cast<uint32_t>(bits)); }
inline double as_double(uint64_t bits) {
  double value;
  memcpy(&value, &bits, 8);
  return value;
}

// What arithmetic leaves. Note [NaN]: as on NVIDIA's GPUs a NaN that arithmetic makes has one payload, whatever those
// of its operands. That of a CPU differs, so bits are the same but for the payload of NaN.
constexpr uint64_t kFloatNan = 0x7fffffff, kDoubleNan = 0x7fffffffffffffff;
constexpr uint16_t kHalfNan = 0x7fff;

inline uint64_t bits_of(float value) { return value != value ? kFloatNan : float_to_bits(value); }
inline uint64_t bits_of(double value) {
  if (value != value) return kDoubleNan;
  uint64_t bits;
  memcpy(&bits, &value, 8);
  return bits;
}
inline uint16_t half_of(float value) { return value != value ? kHalfNan : float_to_fp16(value); }
inline uint16_t brain_half_of(float value) { return value != value ? kHalfNan : float_to_bf16(value); }

// The approximate instructions are defined by the greatest error that they may make, not by their results. Correct code
// gives the same bits with any of them; so each result is off by up to a unit in the last place, as a hash of the
// operand says.
inline float approximately(double exact, uint64_t operand) {
  const float nearest = static_cast<float>(exact);
  if (!(fabsf(nearest) >= 1.17549435e-38f)) return nearest != nearest ? nearest : copysignf(0.0f, nearest);  // ftz
  if (isinf(nearest)) return nearest;
  const uint64_t mixed = (operand + 1) * 0x9e3779b97f4a7c15ull >> 60;
  if (mixed < 5) return nextafterf(nearest, 0.0f);
  return mixed < 10 ? nextafterf(nearest, copysignf(INFINITY, nearest)) : nearest;
}

inline uint64_t inserted(uint64_t value, uint64_t into, uint64_t place, uint64_t length) {
  place &= 0xff, length &= 0xff;
  if (place >= 64 || length == 0) return into;
  const uint64_t mask = (length >= 64 ? ~0ull : (1ull << length) - 1) << place;
  return (into & ~mask) | (value << place & mask);
}

inline uint64_t extracted(uint64_t value, uint64_t position, uint64_t length) {
  position &= 0xff, length &= 0xff;
  if (position > 31) return 0;
  return length >= 32 ? value >> position : value >> position & ((1ull << length) - 1);
}

}  // namespace fusedopt::ptx
