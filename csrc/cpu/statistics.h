// The statistics pass of one chunk: its norm, and whether its elements are finite.
//
// Included once into each instruction set's translation unit, inside an anonymous namespace.

// A chunk is added up in kSums sums, of which element i goes to sum i % kSums, whatever the width of a register.
constexpr int kSums = 32;
constexpr int kLanes = FUSEDOPT_LANES;
constexpr int kVectors = kSums / kLanes;
typedef float FloatLanes __attribute__((vector_size(kLanes * 4)));
typedef double DoubleLanes __attribute__((vector_size(kLanes * 8)));
template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = FloatLanes;
};
template <>
struct LanesOf<double> {
  using type = DoubleLanes;
};

// g++ 12 makes several instructions of a vector conversion: say which one is meant.
FUSEDOPT_HD DoubleLanes widen(FloatLanes x) {
#if FUSEDOPT_LANES == 4
  return DoubleLanes(_mm256_cvtps_pd(__m128(x)));
#else
  return __builtin_convertvector(x, DoubleLanes);
#endif
}
FUSEDOPT_HD DoubleLanes widen(DoubleLanes x) { return x; }

// sum + x * y. Where the processor can, in one instruction: only for products that are exact, so that it rounds the
// same.
FUSEDOPT_HD DoubleLanes add_exact_product(DoubleLanes sum, DoubleLanes x, DoubleLanes y) {
#if FUSEDOPT_LANES == 4
  return DoubleLanes(_mm256_fmadd_pd(__m256d(x), __m256d(y), __m256d(sum)));
#else
  return sum + x * y;
#endif
}

template <NormKind K, class T>
FUSEDOPT_HD DoubleLanes accumulate(DoubleLanes sum, DoubleLanes x, double p) {
  if constexpr (K == NormKind::kNone) return add_exact_product(sum, x, DoubleLanes{});  // NaN once one is not finite
  if constexpr (K == NormKind::kTwo) return sizeof(T) == 4 ? add_exact_product(sum, x, x) : sum + x * x;
  DoubleLanes magnitude = x < 0.0 ? -x : x;
  if constexpr (K == NormKind::kOne) return sum + magnitude;
  if constexpr (K == NormKind::kInf) return magnitude > sum ? magnitude : sum;  // passes over NaN
  if constexpr (K == NormKind::kP) {
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] += power(magnitude[lane], p);
    return sum;
  }
}

template <NormKind K, class V>
FUSEDOPT_HD V combine(V a, V b) {
  if constexpr (K == NormKind::kInf) return a > b ? a : b;
  return a + b;
}

template <class T>
bool any_nonfinite(const T* x, int64_t n, bool* any_nan) {
  bool found = false;
  for (int64_t i = 0; i < n; ++i) {
    bool nonfinite = x[i] - x[i] != T(0);
    found |= nonfinite;
    *any_nan |= x[i] != x[i];
  }
  return found;
}

// The sums of a chunk, in registers while it is short.
struct Sums {
  DoubleLanes vectors[kVectors];
};

// Adds a run of floats or doubles, kSums elements at a time. Runs but the last of a chunk are multiples.
template <NormKind K, class T>
[[gnu::always_inline]] inline void accumulate_run(const T* x, int64_t n, double p, Sums& sums) {
  using Lanes = typename LanesOf<T>::type;
  auto add = [&](const T* from) {
    for (int v = 0; v < kVectors; ++v) {
      Lanes lanes;
      __builtin_memcpy(&lanes, from + v * kLanes, sizeof(Lanes));
      sums.vectors[v] = accumulate<K, T>(sums.vectors[v], widen(lanes), p);
    }
  };
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) add(x + i);
  if (i < n) {
    T tail[kSums] = {};  // zeros add nothing to any norm
    for (int64_t k = 0; i + k < n; ++k) tail[k] = x[i + k];
    add(tail);
  }
}

// Calls visit(pointer, count) with the gradient's elements as T: in place where they are flat T, else block by block.
template <class T, class Visit>
void for_each_block(const Column& grad, DType native, int64_t offset, int64_t length, Visit&& visit) {
  if (!grad.layout && grad.dtype == native) return visit(static_cast<const T*>(grad.data) + offset, length);
  constexpr int64_t kAtOnce = 512;
  T block[kAtOnce];
  for (int64_t done = 0; done < length; done += kAtOnce) {
    int64_t n = length - done < kAtOnce ? length - done : kAtOnce;
    load(grad, offset + done, n, block);
    visit(static_cast<const T*>(block), n);
  }
}

template <NormKind K, class T>
double chunk_total(const Column& grad, DType native, double p, int64_t offset, int64_t length) {
  Sums sums = {};
  for_each_block<T>(grad, native, offset, length, [&](const T* x, int64_t n) { accumulate_run<K>(x, n, p, sums); });
  // Four quarters onto each other, then what is left in turn.
  constexpr int quarter = kVectors / 4;
  double total = 0;
  for (int v = 0; v < quarter; ++v) {
    const DoubleLanes *q0 = sums.vectors + v, *q1 = q0 + quarter, *q2 = q1 + quarter, *q3 = q2 + quarter;
    const DoubleLanes folded = combine<K>(combine<K>(*q0, *q1), combine<K>(*q2, *q3));
    for (int lane = 0; lane < kLanes; ++lane) total = combine<K>(total, folded[lane]);
  }
  return total;
}

template <NormKind K, class T>
bool statistics_chunk(const Column& grad, DType native, double p, int64_t offset, int64_t length, double* partial) {
  const double total = chunk_total<K, T>(grad, native, p, offset, length);
  *partial = total;
  const double witness = K == NormKind::kInf ? chunk_total<NormKind::kNone, T>(grad, native, p, offset, length) : total;
  if (witness - witness == 0.0) return false;
  // A sum of squares of finite fp64 values may have overflowed, and a maximum passes over NaN: look at the elements.
  bool nonfinite = false, nan = false;
  for_each_block<T>(grad, native, offset, length,
                    [&](const T* x, int64_t n) { nonfinite |= any_nonfinite(x, n, &nan); });
  if (nan) *partial = __builtin_nan("");
  return nonfinite;
}

template <class T>
bool statistics_as(const Column& grad, DType native, const StatisticsSettings& s, int64_t offset, int64_t length,
                   double* partial) {
  switch (s.kind) {
    case NormKind::kNone:
      return statistics_chunk<NormKind::kNone, T>(grad, native, s.p, offset, length, partial);
    case NormKind::kOne:
      return statistics_chunk<NormKind::kOne, T>(grad, native, s.p, offset, length, partial);
    case NormKind::kTwo:
      return statistics_chunk<NormKind::kTwo, T>(grad, native, s.p, offset, length, partial);
    case NormKind::kInf:
      return statistics_chunk<NormKind::kInf, T>(grad, native, s.p, offset, length, partial);
    case NormKind::kP:
      return statistics_chunk<NormKind::kP, T>(grad, native, s.p, offset, length, partial);
  }
  return false;
}

bool statistics(const Column& grad, const StatisticsSettings& s, int64_t offset, int64_t length, double* partial) {
  if (grad.dtype == DType::kFloat64) return statistics_as<double>(grad, DType::kFloat64, s, offset, length, partial);
  return statistics_as<float>(grad, DType::kFloat32, s, offset, length, partial);
}
