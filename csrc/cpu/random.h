// Random bits for a block of elements; see Note [Random bits] in csrc/storage.h.
//
// Included once into each instruction set's translation unit, inside an anonymous namespace.

// Several counters at a time, each in a 64-bit lane whose upper half does not matter: what the processor multiplies.
#if defined(__AVX512F__)
constexpr int kCounters = 8;
#elif defined(__AVX2__)
constexpr int kCounters = 4;
#else
constexpr int kCounters = 2;
#endif
typedef uint64_t CounterLanes __attribute__((vector_size(8 * kCounters)));

FUSEDOPT_HD CounterLanes product(CounterLanes a, CounterLanes b) {
#if defined(__AVX512F__)
  // (With a mask: g++ 12 warns of what its own header does without.)
  return CounterLanes(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return CounterLanes(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
  return CounterLanes(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The same as philox(), for counters `eight`, `eight` + 1, ... that differ in their first word only.
FUSEDOPT_HD void random_lanes(const Chance& chance, uint32_t column, uint32_t step, uint64_t eight, uint64_t* out) {
  CounterLanes c0;
  for (int lane = 0; lane < kCounters; ++lane) c0[lane] = eight + static_cast<uint64_t>(lane);
  const CounterLanes zeros = {};
  CounterLanes c1 = c0 >> 32, c2 = zeros + step, c3 = zeros + (chance.stream * kRandomColumns + column);
  uint32_t key0 = uint32_t(chance.seed), key1 = uint32_t(chance.seed >> 32);
  for (int round = 0; round < kRandomRounds; ++round) {
    const CounterLanes product0 = product(c0, zeros + kRandomFactor0), product1 = product(c2, zeros + kRandomFactor1);
    c0 = product1 >> 32 ^ c1 ^ key0;
    c1 = product1;
    c2 = product0 >> 32 ^ c3 ^ key1;
    c3 = product0;
    key0 += kRandomKey0;
    key1 += kRandomKey1;
  }
  const CounterLanes words01 = (c0 & 0xffffffffu) | c1 << 32, words23 = (c2 & 0xffffffffu) | c3 << 32;
  for (int lane = 0; lane < kCounters; ++lane) {
    out[2 * lane] = words01[lane];
    out[2 * lane + 1] = words23[lane];
  }
}

// The bits of `n` elements with consecutive numbers from `number`.
inline void random_run(const Chance& chance, uint32_t column, uint32_t step, uint64_t number, int64_t n,
                       uint16_t* out) {
  uint64_t words[2 * kCounters];
  for (int64_t done = 0; done < n;) {
    const int64_t skipped = static_cast<int64_t>((number + static_cast<uint64_t>(done)) % 8);
    random_lanes(chance, column, step, (number + static_cast<uint64_t>(done)) / 8, words);
    int64_t count = 8 * kCounters - skipped;
    if (count > n - done) count = n - done;
    __builtin_memcpy(out + done, reinterpret_cast<const char*>(words) + 2 * skipped, static_cast<size_t>(count) * 2);
    done += count;
  }
}

// The bits of elements [offset, offset + n) of a row.
inline void random_block(const Chance& chance, uint32_t column, uint32_t step, int64_t offset, int64_t n,
                         uint16_t* out) {
  if (!chance.numbers) {
    return random_run(chance, column, step, chance.first + static_cast<uint64_t>(offset), n, out);
  }
  for_each_run(*chance.numbers, offset, n, [&](int64_t position, int64_t at, int64_t run, int64_t stride) {
    const uint64_t first = chance.first + static_cast<uint64_t>(at);
    if (stride == 1) return random_run(chance, column, step, first, run, out + position);
    for (int64_t k = 0; k < run; ++k) {
      random_run(chance, column, step, first + static_cast<uint64_t>(k * stride), 1, out + position + k);
    }
  });
}
