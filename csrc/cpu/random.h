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

// 0, 1, 2, ...; and the lanes of two vectors in turns.
constexpr uint64_t kCount[] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr uint64_t kInterleaved[] = {0, kCounters, 1, kCounters + 1, 2, kCounters + 2, 3, kCounters + 3};

FUSEDOPT_HD CounterLanes lanes_of(const uint64_t* from) {
  CounterLanes lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// The same as philox(), for counters `eight`, `eight` + 1, ... that differ in their first word only.
FUSEDOPT_HD void random_lanes(const Chance& chance, uint32_t column, uint32_t step, uint64_t eight, uint16_t* out) {
  const CounterLanes zeros = {};
  CounterLanes c0 = lanes_of(kCount) + eight, c1 = c0 >> 32, c2 = zeros + step;
  CounterLanes c3 = zeros + (chance.stream * kRandomColumns + column);
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
  const CounterLanes first = lanes_of(kInterleaved);  // in which order they are in memory
  const CounterLanes words[2] = {__builtin_shuffle(words01, words23, first),
                                 __builtin_shuffle(words01, words23, first + kCounters / 2)};
  __builtin_memcpy(out, words, sizeof(words));
}

// The bits of `n` elements with consecutive numbers from `number`.
inline void random_run(const Chance& chance, uint32_t column, uint32_t step, uint64_t number, int64_t n,
                       uint16_t* out) {
  constexpr int64_t kAtOnce = 8 * kCounters;
  // Some of the elements that a call is for.
  auto some = [&](int64_t done) {
    const uint64_t at = number + static_cast<uint64_t>(done);
    const auto skipped = static_cast<int64_t>(at % 8);
    uint16_t bits[kAtOnce];
    random_lanes(chance, column, step, at / 8, bits);
    const int64_t count = kAtOnce - skipped < n - done ? kAtOnce - skipped : n - done;
    __builtin_memcpy(out + done, bits + skipped, static_cast<size_t>(count) * 2);
    return done + count;
  };
  int64_t done = number % 8 == 0 ? 0 : some(0);
  for (; done + kAtOnce <= n; done += kAtOnce) {
    random_lanes(chance, column, step, (number + static_cast<uint64_t>(done)) / 8, out + done);
  }
  while (done < n) done = some(done);
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
