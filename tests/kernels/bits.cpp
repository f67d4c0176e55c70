// Runs the CPU kernels, without torch, and prints a hash of the bits that every case leaves behind: a line
// "instruction set, case, hash". tests/test_aarch64.py compares the lines of two architectures.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/rule_interface.h"

using namespace fusedopt;

namespace {

constexpr int64_t kLength = 1003;  // more than a block, and no multiple of any number of lanes

uint64_t state;

uint64_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (state >> 33) ^ (state >> 11 << 31);
}

// Mostly numbers as in training; some tiny ones, and, where it is asked for, some that are not finite.
double random_number(bool strange) {
  const double sign = random_bits() & 1 ? -1 : 1;
  const double mantissa = 1 + static_cast<double>(random_bits() & 0xffffff) / 0x1000000;
  const int kind = static_cast<int>(random_bits() % 64);
  if (strange && kind < 2) return kind ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  if (kind < 6) return sign * std::ldexp(mantissa, -130 - kind);  // subnormal as float
  return sign * std::ldexp(mantissa, static_cast<int>(random_bits() % 20) - 14);
}

// Rounded towards zero, which is as good as any here.
uint16_t half_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  const uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7e00;
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign | (magnitude & 0x3));  // a subnormal one, or zero
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000) >> 13));
}

struct Memory {
  DType dtype;
  std::vector<unsigned char> bytes;
  Layout layout{};
  bool strided = false;

  Memory(DType type, bool strange, bool positive, bool transposed) : dtype(type), strided(transposed) {
    bytes.resize(static_cast<size_t>(kLength * element_size(dtype)));
    for (int64_t i = 0; i < kLength; ++i) {
      double number = random_number(strange);
      if (positive) number = std::fabs(number);
      put(i, number);
    }
    if (strided) layout = {2, {59, 17}, {1, 59}};  // 17 * 59 = 1003
  }
  void put(int64_t i, double value) {
    unsigned char* at = bytes.data() + i * element_size(dtype);
    const float single = static_cast<float>(value);
    uint32_t word;
    std::memcpy(&word, &single, 4);
    const uint16_t upper = static_cast<uint16_t>(word >> 16), half = half_of(single);
    if (dtype == DType::kFloat64) std::memcpy(at, &value, 8);
    if (dtype == DType::kFloat32) std::memcpy(at, &single, 4);
    if (dtype == DType::kBFloat16) std::memcpy(at, &upper, 2);
    if (dtype == DType::kFloat16) std::memcpy(at, &half, 2);
  }
  Column column() { return {bytes.data(), strided ? &layout : nullptr, dtype}; }
};

uint64_t fnv(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x100000001b3u; }

// Which NaN it is differs between architectures, and means nothing.
uint64_t hash_of(uint64_t hash, const Memory& memory) {
  for (int64_t i = 0; i < kLength; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, memory.bytes.data() + i * element_size(memory.dtype),
                static_cast<size_t>(element_size(memory.dtype)));
    const uint64_t infinity = memory.dtype == DType::kFloat64    ? 0x7ff0000000000000u
                              : memory.dtype == DType::kFloat32  ? 0x7f800000u
                              : memory.dtype == DType::kBFloat16 ? 0x7f80u
                                                                 : 0x7c00u;
    const uint64_t sign = memory.dtype == DType::kFloat64   ? 0x8000000000000000u
                          : memory.dtype == DType::kFloat32 ? 0x80000000u
                                                            : 0x8000u;
    hash = fnv(hash, (bits & ~sign) > infinity ? infinity + 1 : bits);
  }
  return hash;
}

const char* name_of(DType dtype) {
  const char* const names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

void check_updates(const cpu::Kernels& kernels, const RuleInterface& rule, const std::vector<double>& hyper,
                   double step) {
  const unsigned variant = rule.variant(hyper.data(), step);
  ScalarsStorage scalars{};
  rule.derive(hyper.data(), step, &scalars);
  for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (int flags = 0; flags < 8; ++flags) {
      const bool strange = flags & 1, transposed = flags & 2, write_back = flags & 4;
      Memory param(dtype, strange, false, false), grad(dtype, strange, false, transposed);
      std::vector<Memory> states;
      for (int s = 0; s < 3; ++s) states.emplace_back(dtype, false, s > 0, false);
      TensorRow row{};
      row.param = param.column();
      row.grad = grad.column();
      for (int s = 0; s < rule.state_count; ++s) row.state[s] = states[static_cast<size_t>(s)].column();
      row.numel = kLength;
      row.variant = variant;
      const UpdateSettings settings = {0.37, write_back ? 0.5 : INFINITY, write_back};
      kernels.update[rule.id](row, scalars, settings, 0, 700);
      kernels.update[rule.id](row, scalars, settings, 700, kLength - 700);
      uint64_t hash = hash_of(hash_of(0xcbf29ce484222325u, param), grad);
      for (const Memory& state : states) hash = hash_of(hash, state);
      std::printf("%s, %s variant %u %s %d, %016llx\n", kernels.isa, rule.name, variant, name_of(dtype), flags,
                  static_cast<unsigned long long>(hash));
    }
  }
}

void check_statistics(const cpu::Kernels& kernels) {
  for (NormKind kind : {NormKind::kNone, NormKind::kOne, NormKind::kTwo, NormKind::kInf}) {
    for (DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
      for (int flags = 0; flags < 4; ++flags) {
        Memory grad(dtype, flags & 1, false, flags & 2);
        double partial = 0;
        const bool nonfinite = kernels.statistics(grad.column(), {kind, 0}, 3, kLength - 3, &partial);
        uint64_t bits;
        std::memcpy(&bits, &partial, 8);
        if (std::isnan(partial)) bits = 1;
        std::printf("%s, statistics %d %s %d, %d %016llx\n", kernels.isa, static_cast<int>(kind), name_of(dtype), flags,
                    nonfinite, static_cast<unsigned long long>(bits));
      }
    }
  }
}

void check(const cpu::Kernels* kernels) {
  if (!kernels) return;
  state = 1;  // the same numbers for every instruction set
  // lr, betas, eps, weight_decay, amsgrad, maximize, decoupled
  for (int flags = 0; flags < 8; ++flags) {
    check_updates(*kernels, rule_named("adam"),
                  {1e-3, 0.9, 0.999, 1e-8, flags & 1 ? 0.01 : 0, flags & 2 ? 1.0 : 0, 0, flags & 4 ? 1.0 : 0}, 3);
  }
  // lr, momentum, dampening, weight_decay, nesterov, maximize
  for (int flags = 0; flags < 8; ++flags) {
    const std::vector<double> hyper = {0.1, flags & 1 ? 0.9 : 0, 0.1, flags & 2 ? 5e-4 : 0, flags & 4 ? 1.0 : 0, 1};
    for (double step : {1.0, 2.0}) check_updates(*kernels, rule_named("sgd"), hyper, step);
  }
  check_statistics(*kernels);
}

}  // namespace

int main() {
  check(cpu::kernels_baseline());
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    check(cpu::kernels_avx2());
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    check(cpu::kernels_avx512());
  }
#endif
  return 0;
}
