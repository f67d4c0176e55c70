// What each instruction does to the lanes of a warp.
#include <algorithm>
#include <cmath>

#include "block.h"
#include "numbers.h"

namespace fusedopt::ptx {
namespace {

// Calls `operation` with numbers of the type: floats, doubles, or unsigned integers of 64 bits, of whose result the low
// bits count.
template <class Each, class Operation>
void with_numbers(Type type, const Each& each, const Operation& operation) {
  if (type.is_float(4)) {
    each([&](uint64_t a, uint64_t b, uint64_t c) { return bits_of(operation(as_float(a), as_float(b), as_float(c))); });
  } else if (type.is_float(8)) {
    each([&](uint64_t a, uint64_t b, uint64_t c) {
      return bits_of(operation(as_double(a), as_double(b), as_double(c)));
    });
  } else {
    each([&](uint64_t a, uint64_t b, uint64_t c) { return cut(operation(a, b, c), type); });
  }
}

// The same for integers whose sign counts.
template <class Each, class Operation>
void with_integers(Type type, const Each& each, const Operation& operation) {
  if (type.kind == Kind::kSigned) {
    each([&](uint64_t a, uint64_t b, uint64_t c) {
      return cut(static_cast<uint64_t>(operation(integer(a, type), integer(b, type), integer(c, type))), type);
    });
  } else {
    each([&](uint64_t a, uint64_t b, uint64_t c) {
      return cut(operation(cut(a, type), cut(b, type), cut(c, type)), type);
    });
  }
}

template <class T>
bool compare(Comparison comparison, T a, T b) {
  switch (comparison) {
    case Comparison::kEqual:
      return a == b;
    case Comparison::kNotEqual:
      return a < b || a > b;  // false for NaN
    case Comparison::kLess:
      return a < b;
    case Comparison::kLessEqual:
      return a <= b;
    case Comparison::kGreater:
      return a > b;
    case Comparison::kGreaterEqual:
      return a >= b;
    case Comparison::kOrdered:
      return a == a && b == b;
    default:
      return a != a || b != b;
  }
}

bool compare(const Instruction& instruction, uint64_t a, uint64_t b) {
  const Type type = instruction.type;
  if (type.kind == Kind::kFloat) {
    const double x = type.bytes == 4 ? as_float(a) : as_double(a), y = type.bytes == 4 ? as_float(b) : as_double(b);
    return compare(instruction.comparison, x, y) || (instruction.or_unordered && (x != x || y != y));
  }
  if (type.kind == Kind::kSigned) return compare(instruction.comparison, integer(a, type), integer(b, type));
  return compare(instruction.comparison, cut(a, type), cut(b, type));
}

// The smaller of two floats; NaN if one is, and -0 is less than +0.
template <class T>
T smaller(T x, T y) {
  if (x != x || y != y) return x + y;
  return x < y || (x == y && std::signbit(static_cast<double>(x))) ? x : y;
}

// prmt: four bytes of eight, each chosen by four bits; the highest of these spreads the byte's sign instead.
uint64_t permuted(uint64_t a, uint64_t b, uint64_t choice) {
  const uint64_t bytes = low_bits(a, 4) | b << 32;
  uint64_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint64_t selector = choice >> 4 * i & 15;
    uint64_t byte = bytes >> 8 * (selector & 7) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}

uint64_t shifted(uint64_t value, uint64_t by, Type type, bool left) {
  const uint64_t bits = 8ull * type.bytes, distance = std::min<uint64_t>(low_bits(by, 4), bits);
  if (left) return distance == bits ? 0 : cut(value << distance, type);
  if (type.kind == Kind::kSigned)
    return cut(static_cast<uint64_t>(integer(value, type) >> std::min(distance, bits - 1)), type);
  return distance == bits ? 0 : cut(value, type) >> distance;
}

// 1 / x with 20 bits of the mantissa or so: the first guess of a division in double.
uint64_t approximate_double_reciprocal(uint64_t bits) {
  constexpr uint64_t kHigh = 0xffffffff00000000;
  return bits_of(1.0 / as_double(bits & kHigh)) & kHigh;
}

float flushed(float value) { return fabsf(value) < 1.17549435e-38f ? copysignf(0.0f, value) : value; }

// Of the conversions, those that occur; false for others.
bool convert(const Instruction& instruction, uint64_t a, uint64_t& to) {
  const Type type = instruction.type, from = instruction.from;
  double value;
  if (from.is_integer() && type.is_integer()) {
    to = cut(static_cast<uint64_t>(integer(a, from)), type);
    return true;
  }
  if (from.is_integer() && type.is_float(4)) {
    to = bits_of(from.kind == Kind::kSigned ? static_cast<float>(integer(a, from)) : static_cast<float>(cut(a, from)));
    return true;
  }
  if (from.is_integer()) {
    value = from.kind == Kind::kSigned ? static_cast<double>(integer(a, from)) : static_cast<double>(cut(a, from));
  } else if (from.kind == Kind::kFloat) {
    value = from.bytes == 8 ? as_double(a) : from.bytes == 4 ? as_float(a) : fp16_to_float(static_cast<uint16_t>(a));
  } else {
    value = bf16_to_float(static_cast<uint16_t>(a));
  }
  if (instruction.truncates && type.is_float(8)) {
    to = bits_of(trunc(value));
  } else if (instruction.truncates) {
    if (!type.is_integer() || type.bytes < 4) return false;
    const int bits = 8 * type.bytes - (type.kind == Kind::kSigned ? 1 : 0);
    const double end = ldexp(1, bits), first = type.kind == Kind::kSigned ? -end : 0, whole = trunc(value);
    if (value != value) {
      to = from.bytes == 8 || type.bytes == 8 ? 1ull << (8 * type.bytes - 1) : 0;
    } else if (whole >= end) {
      to = bits == 64 ? ~0ull : (1ull << bits) - 1;
    } else if (type.kind == Kind::kSigned) {
      to = cut(static_cast<uint64_t>(static_cast<int64_t>(std::max(whole, first))), type);
    } else {
      to = static_cast<uint64_t>(std::max(whole, first));
    }
  } else if (type.is_float(8)) {
    to = bits_of(value);
  } else if (type.is_float(4)) {
    to = bits_of(static_cast<float>(value));
  } else if (from.is_float(4) && type.is_float(2)) {
    to = half_of(static_cast<float>(value));
  } else if (from.is_float(4) && type.kind == Kind::kBrainFloat) {
    to = brain_half_of(static_cast<float>(value));
  } else {
    return false;
  }
  return true;
}

}  // namespace

void Block::execute(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  auto each_lane = [lanes](const auto& act) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) act(lane);
    }
  };
  switch (instruction.opcode) {
    case Opcode::kBranch:
      return each_lane([&](int lane) { warp.at[lane] = instruction.target; });
    case Opcode::kReturn:
      return each_lane([&](int lane) {
        if (warp.return_to[lane] == kNoRegister) {
          warp.state[lane] = State::kDone;
        } else {
          warp.at[lane] = warp.return_to[lane];
          warp.return_to[lane] = kNoRegister;
        }
      });
    case Opcode::kCall:
      return each_lane([&](int lane) {
        if (warp.return_to[lane] != kNoRegister) fail(instruction, warp, lane, "a call within a call");
        warp.return_to[lane] = warp.at[lane];
        warp.at[lane] = instruction.target;
      });
    case Opcode::kLoad:
    case Opcode::kStore:
      return access(warp, instruction, lanes);
    case Opcode::kAtomicAdd:
    case Opcode::kAtomicIncrement:
    case Opcode::kAtomicOr:
      return each_lane([&](int lane) { atomic(warp, instruction, lane); });
    case Opcode::kFence:
      return each_lane([&](int lane) { fence(warp, lane); });
    case Opcode::kLetNextStart:
      return;
    case Opcode::kWaitForPrevious:
      return each_lane([&](int lane) { warp.waited[lane] = true; });
    case Opcode::kBarrier:
    case Opcode::kBarrierOr:
      return each_lane([&](int lane) {
        warp.state[lane] = State::kAtBarrier;
        if (instruction.opcode == Opcode::kBarrierOr) barrier_or_ |= warp.lanes_of(instruction.with[0])[lane] & 1;
      });
    case Opcode::kShuffleDown:
    case Opcode::kShuffleButterfly:
    case Opcode::kReduceOr:
    case Opcode::kReduceMaximum:
    case Opcode::kLoadMatrix:
      return each_lane([&](int lane) { warp.state[lane] = State::kAtWarp; });
    default:
      if (!calculate(warp, instruction, lanes)) fail(instruction, warp, 0, "unknown instruction: of these types");
  }
}

// Registers to registers; false for what does not occur.
bool Block::calculate(Warp& warp, const Instruction& instruction, uint32_t lanes) {
  const Type type = instruction.type;
  uint64_t* const to = warp.lanes_of(instruction.to[0]);
  const uint64_t* const a = warp.lanes_of(std::max(instruction.with[0], 0));
  const uint64_t* const b = warp.lanes_of(std::max(instruction.with[1], 0));
  const uint64_t* const c = warp.lanes_of(std::max(instruction.with[2], 0));
  auto each = [=](const auto& make) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes >> lane & 1) to[lane] = make(a[lane], b[lane], c[lane]);
    }
  };
  auto wide = [type](uint64_t x, uint64_t y) {
    return static_cast<uint64_t>(integer(x, type)) * static_cast<uint64_t>(integer(y, type));
  };
  const Type twice = {type.kind, static_cast<uint8_t>(2 * type.bytes)};
  switch (instruction.opcode) {
    case Opcode::kMove:
      each([&](uint64_t x, uint64_t, uint64_t) { return cut(x, type); });
      return true;
    case Opcode::kPack:
    case Opcode::kUnpack: {
      const int bytes = type.bytes / instruction.vector;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        uint64_t packed = 0;
        const uint64_t whole = a[lane];
        for (int i = 0; i < instruction.vector; ++i) {
          if (instruction.opcode == Opcode::kPack) {
            packed |= low_bits(warp.lanes_of(instruction.with[i])[lane], bytes) << 8 * bytes * i;
          } else {
            warp.lanes_of(instruction.to[i])[lane] = low_bits(whole >> 8 * bytes * i, bytes);
          }
        }
        if (instruction.opcode == Opcode::kPack) to[lane] = packed;
      }
      return true;
    }
    case Opcode::kAdd:
      with_numbers(type, each, [](auto x, auto y, auto) { return x + y; });
      return true;
    case Opcode::kSubtract:
      with_numbers(type, each, [](auto x, auto y, auto) { return x - y; });
      return true;
    case Opcode::kMultiply:
      with_numbers(type, each, [](auto x, auto y, auto) { return x * y; });
      return true;
    case Opcode::kMultiplyWide:
      each([&](uint64_t x, uint64_t y, uint64_t) { return cut(wide(x, y), twice); });
      return true;
    case Opcode::kMultiplyAdd:
      each([&](uint64_t x, uint64_t y, uint64_t z) { return cut(x * y + z, type); });
      return true;
    case Opcode::kMultiplyAddWide:
      each([&](uint64_t x, uint64_t y, uint64_t z) { return cut(wide(x, y) + z, twice); });
      return true;
    case Opcode::kFusedMultiplyAdd:
      if (type.bytes == 4) {
        each([](uint64_t x, uint64_t y, uint64_t z) { return bits_of(fmaf(as_float(x), as_float(y), as_float(z))); });
      } else {
        each([](uint64_t x, uint64_t y, uint64_t z) { return bits_of(fma(as_double(x), as_double(y), as_double(z))); });
      }
      return true;
    case Opcode::kRemainder:
    case Opcode::kDivide:
      if (type.is_integer()) {
        for (int lane = 0; lane < kLanes; ++lane) {
          if (lanes >> lane & 1 && cut(b[lane], type) == 0) fail(instruction, warp, lane, "division by zero");
        }
        const bool divides = instruction.opcode == Opcode::kDivide;
        with_integers(type, each, [=](auto x, auto y, auto) { return divides ? x / y : x % y; });
      } else {
        with_numbers(type, each, [](auto x, auto y, auto) { return x / y; });
      }
      return true;
    case Opcode::kReciprocal:
      with_numbers(type, each, [](auto x, auto, auto) { return decltype(x)(1) / x; });
      return true;
    case Opcode::kApproximateReciprocal:
      if (type.bytes == 8) {
        each([](uint64_t x, uint64_t, uint64_t) { return approximate_double_reciprocal(x); });
      } else {
        each([](uint64_t x, uint64_t, uint64_t) { return bits_of(approximately(1.0 / flushed(as_float(x)), x)); });
      }
      return true;
    case Opcode::kApproximateInverseSquareRoot:
      each([](uint64_t x, uint64_t, uint64_t) {
        return bits_of(approximately(1.0 / sqrt(static_cast<double>(flushed(as_float(x)))), x));
      });
      return true;
    case Opcode::kSquareRoot:
      with_numbers(type, each, [](auto x, auto, auto) { return decltype(x)(__builtin_sqrt(x)); });
      return true;
    case Opcode::kMinimum:
    case Opcode::kMaximum: {
      const bool least = instruction.opcode == Opcode::kMinimum;
      auto choose = [least](auto x, auto y, auto) { return least ? smaller(x, y) : -smaller(-x, -y); };
      if (type.kind == Kind::kFloat) {
        with_numbers(type, each, choose);
      } else {
        with_integers(type, each, [least](auto x, auto y, auto) { return least ? std::min(x, y) : std::max(x, y); });
      }
      return true;
    }
    case Opcode::kNegate: {
      const uint64_t sign = type.kind == Kind::kFloat ? 1ull << (8 * type.bytes - 1) : 0;
      each([=](uint64_t x, uint64_t, uint64_t) { return cut(sign ? x ^ sign : 0 - x, type); });
      return true;
    }
    case Opcode::kAbsolute:
      if (type.is_float(4)) {
        const bool flushes = instruction.flushes;
        each([=](uint64_t x, uint64_t, uint64_t) {
          const uint64_t magnitude = x & 0x7fffffff;
          return flushes && magnitude < 0x00800000 ? 0 : magnitude;
        });
      } else if (type.is_float(8)) {
        each([](uint64_t x, uint64_t, uint64_t) { return x & ~(1ull << 63); });
      } else {
        with_integers(type, each, [](auto x, auto, auto) { return x < decltype(x)(0) ? decltype(x)(0) - x : x; });
      }
      return true;
    case Opcode::kAnd:
      each([&](uint64_t x, uint64_t y, uint64_t) { return cut(x & y, type); });
      return true;
    case Opcode::kOr:
      each([&](uint64_t x, uint64_t y, uint64_t) { return cut(x | y, type); });
      return true;
    case Opcode::kXor:
      each([&](uint64_t x, uint64_t y, uint64_t) { return cut(x ^ y, type); });
      return true;
    case Opcode::kNot:
      each([&](uint64_t x, uint64_t, uint64_t) { return cut(~x, type); });
      return true;
    case Opcode::kShiftLeft:
    case Opcode::kShiftRight: {
      const bool left = instruction.opcode == Opcode::kShiftLeft;
      each([=](uint64_t x, uint64_t y, uint64_t) { return shifted(x, y, type, left); });
      return true;
    }
    case Opcode::kExtractBits:
      each([](uint64_t x, uint64_t y, uint64_t z) { return extracted(low_bits(x, 4), y, z); });
      return true;
    case Opcode::kInsertBits: {  // bits of a into b, from place c on, as many as the last operand says
      const uint64_t* const lengths = warp.lanes_of(instruction.with[3]);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (lanes >> lane & 1) to[lane] = cut(inserted(a[lane], b[lane], c[lane], lengths[lane]), type);
      }
      return true;
    }
    case Opcode::kPermuteBytes:
      each(permuted);
      return true;
    case Opcode::kSelect:
      each([&](uint64_t x, uint64_t y, uint64_t z) { return cut(z & 1 ? x : y, type); });
      return true;
    case Opcode::kCompare:
      each([&](uint64_t x, uint64_t y, uint64_t) -> uint64_t { return compare(instruction, x, y); });
      return true;
    case Opcode::kConvert: {
      bool known = true;
      each([&](uint64_t x, uint64_t, uint64_t) {
        uint64_t result = 0;
        known &= convert(instruction, x, result);
        return result;
      });
      return known;
    }
    case Opcode::kConvertPair:
      each([](uint64_t x, uint64_t y, uint64_t) -> uint64_t {
        return static_cast<uint64_t>(half_of(as_float(x))) << 16 | half_of(as_float(y));
      });
      return true;
    case Opcode::kSharedToGeneric:
      each([&](uint64_t x, uint64_t, uint64_t) { return shared_.base() + x; });
      return true;
    default:
      return false;
  }
}

}  // namespace fusedopt::ptx
