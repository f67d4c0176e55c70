// How one element is kept in fewer bits than it is calculated in: rounding by chance, masters in two pieces, codes.
//
// Everything here is a function of single elements in portable arithmetic, whose results are the same bits on every
// backend; fusedopt/rules/codes.py has the same in tensors, and the Triton kernels once more. Functions are free of
// branches, so that a loop over them becomes vector code.
//
// Note [Random bits]
// Rounding by chance takes 16 random bits per element from Philox4x32 with 7 rounds (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", 2011), a function of a counter and a key that keeps nothing: the key is the optimizer's
// seed, and the counter says which number is being rounded: the element's number in its parameter's canonical order (of
// the whole parameter, where this process has a shard), the parameter's number in its optimizer, the column and the
// step. A counter gives 8 such pieces, for 8 neighbouring elements, in the order of its words, low halves first.
//
// Note [Means of squares]
// A second moment spans twice the orders of magnitude that a gradient does. In float16, which has few, its square root
// is stored. One that is not zero is never stored as zero: a first moment divided by it would be a step of any size. It
// changes by a thousandth in a step, so where it is rounded to nearest in few bits it does not fall: its 8-bit codes
// are always rounded by chance.
//
// Note [Codes]
// In 8 bits, kCodeBlock neighbours in canonical order share a scale, a bfloat16. A magnitude x is coded by the leading
// bits of the float 1 + x / scale: linear near zero, and ever coarser towards the block's largest. The scale has so
// few bits that the largest decoded magnitude is exact, and gives the same scale again: to decode and to code again, to
// nearest, changes nothing. A block with a number that is not finite has the scale NaN, and is all NaN from then on.
#pragma once
#include "convert.h"
#include "tables.h"

namespace fusedopt {

struct RandomWords {
  uint32_t word[4];
};

FUSEDOPT_HD uint32_t high_product(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

// Philox4x32. With 7 rounds it passes all tests that its authors know; 10 are their margin.
constexpr int kRandomRounds = 7;
constexpr uint32_t kRandomFactor0 = 0xd2511f53, kRandomFactor1 = 0xcd9e8d57;
constexpr uint32_t kRandomKey0 = 0x9e3779b9, kRandomKey1 = 0xbb67ae85;  // added to the key after each round

FUSEDOPT_HD RandomWords philox(RandomWords counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kRandomRounds; ++round) {
    const uint32_t high0 = high_product(kRandomFactor0, c0), low0 = kRandomFactor0 * c0;
    const uint32_t high1 = high_product(kRandomFactor1, c2), low1 = kRandomFactor1 * c2;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += kRandomKey0;
    key1 += kRandomKey1;
  }
  return {{c0, c1, c2, c3}};
}

// The numbers of columns in a counter: the parameter, then the rule's states, then the master.
constexpr uint32_t kRandomColumns = 8;

// The random bits of elements 8 * eight to 8 * eight + 7.
FUSEDOPT_HD RandomWords random_words(const Chance& chance, uint32_t column, uint32_t step, uint64_t eight) {
  const RandomWords counter = {{uint32_t(eight), uint32_t(eight >> 32), step, chance.stream * kRandomColumns + column}};
  return philox(counter, uint32_t(chance.seed), uint32_t(chance.seed >> 32));
}

// Rounded by chance: to the neighbour above in magnitude with the probability of the distance to the one below, from 16
// random bits. An infinity stays one.
FUSEDOPT_HD uint16_t float_to_bf16(float value, uint32_t random) {
  return value != value ? uint16_t(0x7fc0) : uint16_t((float_to_bits(value) + random) >> 16);
}

FUSEDOPT_HD uint16_t float_to_fp16(float value, uint32_t random) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  const uint32_t normal = (rest + (random >> 3) + 0xc8000000u) >> 13;
  // Below 2^-14 fp16 has a fixed point, here with 16 further bits.
  const float fixed = bits_to_float(rest < 0x38800000u ? rest : 0x38800000u) * 0x1p40f;
  const uint32_t small = (uint32_t(int32_t(fixed)) + random) >> 16;
  const uint32_t is_small = 0u - uint32_t(rest < 0x38800000u);  // (g++ 12 makes no vector code of `?:` here)
  uint32_t magnitude = (small & is_small) | (normal & ~is_small);
  magnitude = rest < 0x47800000u ? magnitude : 0x7c00u;
  magnitude = rest > 0x7f800000u ? 0x7e00u : magnitude;
  return uint16_t(sign | magnitude);
}

// Whether a store of this form is rounded by chance, in a row of which that is asked or not.
FUSEDOPT_HD bool rounds_by_chance(DType dtype, bool asked) {
  if (dtype == DType::kUnsigned8) return true;
  return asked &&
         (dtype == DType::kBFloat16 || dtype == DType::kFloat16 || dtype == DType::kRoot16 || dtype == DType::kSigned8);
}

// A float32 in two pieces: the bfloat16 nearest to it, and the difference in units of its last place. A number halfway
// between two goes away from zero: both differences would not fit. NaN is the usual one.
FUSEDOPT_HD uint32_t plain_bits(float value) { return value != value ? 0x7fc00000u : float_to_bits(value); }

FUSEDOPT_HD uint16_t high_piece(uint32_t bits) { return uint16_t((bits + 0x8000u) >> 16); }

// The float32 of a bfloat16, as its bits, and the difference. Where somebody has written another bfloat16, the
// difference may lead across zero or to NaN, where no two pieces of one number lead: then it is the bfloat16.
FUSEDOPT_HD float join_pieces(uint32_t high, int32_t rest) {
  const uint32_t joined = high + uint32_t(rest);
  const uint32_t crosses = (joined ^ high) >> 31;
  const uint32_t spoils =
      uint32_t((joined & 0x7fffffffu) > 0x7f800000u) & uint32_t((high & 0x7fffffffu) <= 0x7f800000u);
  return bits_to_float((crosses | spoils) != 0 ? high : joined);
}

// The same with 8 bits for the difference, of a float32 rounded to 24 bits: to nearest even, or by chance.
FUSEDOPT_HD uint32_t round_to_24(uint32_t bits) { return (bits + 0x7fu + ((bits >> 8) & 1u)) & 0xffffff00u; }
FUSEDOPT_HD uint32_t round_to_24(uint32_t bits, uint32_t random) { return (bits + (random >> 8)) & 0xffffff00u; }

// Codes; see Note [Codes].
struct SignedCode {
  static constexpr uint32_t kMantissa = 4, kMost = 127;
};
struct UnsignedCode {
  static constexpr uint32_t kMantissa = 4, kMost = 255;
};

template <class Code>
FUSEDOPT_HD float largest() {
  return bits_to_float((Code::kMost << (23 - Code::kMantissa)) + 0x3f800000u) - 1.0f;
}

// The scale of a block whose largest magnitude this is, as a bfloat16. NaN for one that is not finite, 0 where
// magnitudes are too small to have one: they are coded as zeros.
template <class Code>
FUSEDOPT_HD uint16_t scale_of(float magnitude) {
  const float scale = magnitude / largest<Code>();
  const uint32_t up = (float_to_bits(scale) + 0xffffu) >> 16;
  return magnitude - magnitude != 0.0f ? uint16_t(0x7fc0) : scale < 0x1p-126f ? uint16_t(0) : uint16_t(up);
}

FUSEDOPT_HD float inverse_scale(uint16_t scale) { return scale == 0 ? 0.0f : 1.0f / bf16_to_float(scale); }

// Half a step, for rounding to nearest, and 16 random bits in its place.
template <class Code>
FUSEDOPT_HD uint32_t code_rounding() {
  return 1u << (22 - Code::kMantissa);
}
template <class Code>
FUSEDOPT_HD uint32_t code_rounding(uint32_t random) {
  return random << (7 - Code::kMantissa);
}

template <class Code>
FUSEDOPT_HD uint32_t code_of(float magnitude, float inverse, uint32_t rounding) {
  constexpr uint32_t kShift = 23 - Code::kMantissa;
  const uint32_t code = ((float_to_bits(magnitude * inverse + 1.0f) + rounding) >> kShift) - (0x3f800000u >> kShift);
  return code < Code::kMost ? code : Code::kMost;
}

template <class Code>
FUSEDOPT_HD float magnitude_of(uint32_t code) {
  return bits_to_float((code << (23 - Code::kMantissa)) + 0x3f800000u) - 1.0f;
}

FUSEDOPT_HD uint8_t encode_signed(float value, float inverse, uint32_t rounding) {
  const uint32_t code = code_of<SignedCode>(bits_to_float(float_to_bits(value) & 0x7fffffffu), inverse, rounding);
  return uint8_t(value < 0 ? code | 0x80u : code);
}

FUSEDOPT_HD float decode_signed(uint8_t code, float scale) {
  return magnitude_of<SignedCode>(code & 0x7fu) * (code & 0x80u ? -scale : scale);
}

// See Note [Means of squares].
FUSEDOPT_HD uint8_t encode_unsigned(float value, float inverse, uint32_t rounding) {
  const uint32_t code = code_of<UnsignedCode>(value, inverse, rounding);
  const float zero = inverse > 0 ? 0.0f : __builtin_inff();  // without a scale all is zero
  const uint32_t least = value > zero ? 1u : 0u;
  return uint8_t(code < least ? least : code);
}

FUSEDOPT_HD float decode_unsigned(uint8_t code, float scale) { return magnitude_of<UnsignedCode>(code) * scale; }

// A root that float16 has room for: an infinity would stay one for ever, and its weight would never move again.
template <class T>
FUSEDOPT_HD T within_fp16(T root) {
  return root > T(65504) && root - root == T(0) ? T(65504) : root;
}

// A root in float16 that is not zero unless it is.
FUSEDOPT_HD uint16_t root_to_fp16(float root) {
  root = within_fp16(root);
  const uint16_t half = float_to_fp16(root);
  return root > 0 && half == 0 ? uint16_t(1) : half;
}
FUSEDOPT_HD uint16_t root_to_fp16(float root, uint32_t random) {
  root = within_fp16(root);
  const uint16_t half = float_to_fp16(root, random);
  return root > 0 && half == 0 ? uint16_t(1) : half;
}

}  // namespace fusedopt
