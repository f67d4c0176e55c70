// Loads and stores of columns in any dtype and layout, to and from float or double blocks.
//
// A store rounds to nearest even, or by chance where it is given random bits; see csrc/storage.h. A count of elements
// is a number, or `Whole`, which the compiler knows: kBlock.
//
// Included once into each instruction set's translation unit, inside an anonymous namespace.

// Calls visit(begin, count) for 8 elements at a time, a constant for the compiler, and for those left over.
template <class Visit>
FUSEDOPT_HD void for_each_eight(int64_t n, Visit&& visit) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) visit(i, 8);
  if (i < n) visit(i, static_cast<int>(n - i));
}

template <class T>
void load_fp16(const uint16_t* in, int64_t n, T* out) {
#if defined(FUSEDOPT_HAS_F16C)
  for_each_eight(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    uint16_t piece[8] = {};
    float block[8];
    __builtin_memcpy(piece, in + i, static_cast<size_t>(count) * 2);
    _mm256_storeu_ps(block, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(piece))));
    for (int k = 0; k < count; ++k) out[i + k] = T(block[k]);
  });
#else
  for (int64_t i = 0; i < n; ++i) out[i] = T(fp16_to_float(in[i]));
#endif
}

// What `of` makes of each element.
template <class T, class Of>
void store_fp16(uint16_t* out, int64_t n, const T* in, const Of& of) {
#if defined(FUSEDOPT_HAS_F16C)
  for_each_eight(n, [&](int64_t i, int count) __attribute__((always_inline)) {
    float block[8] = {};
    uint16_t piece[8];
    for (int k = 0; k < count; ++k) block[k] = narrow(of(in[i + k]));
    __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(block), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(piece), half);
    __builtin_memcpy(out + i, piece, static_cast<size_t>(count) * 2);
  });
#else
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_fp16(narrow(of(in[i])));
#endif
}

// The roots of a block, of which a column in few bits keeps what it can.
template <class T>
void store_root16(uint16_t* out, int64_t n, const T* in, const uint16_t* random) {
  if (random) {
    for (int64_t i = 0; i < n; ++i) out[i] = root_to_fp16(narrow(square_root(in[i])), random[i]);
    return;
  }
  store_fp16(out, n, in, [](T x) { return within_fp16(square_root(x)); });
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] > 0 && out[i] == 0 ? uint16_t(1) : out[i];
}

template <class T>
void load_flat(const void* data, DType dtype, int64_t offset, int64_t n, T* __restrict out) {
  switch (dtype) {
    case DType::kFloat32: {
      auto* in = static_cast<const float*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = T(in[i]);
      break;
    }
    case DType::kFloat64: {
      auto* in = static_cast<const double*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = T(in[i]);
      break;
    }
    case DType::kBFloat16: {
      auto* in = static_cast<const uint16_t*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = T(bf16_to_float(in[i]));
      break;
    }
    case DType::kFloat16:
      load_fp16(static_cast<const uint16_t*>(data) + offset, n, out);
      break;
    case DType::kRoot16:
      load_fp16(static_cast<const uint16_t*>(data) + offset, n, out);
      for (int64_t i = 0; i < n; ++i) out[i] *= out[i];
      break;
    default:  // forms of blocks and pieces, see forms.h
      break;
  }
}

template <class T>
void store_flat(void* data, DType dtype, int64_t offset, int64_t n, const T* __restrict in,
                const uint16_t* __restrict random) {
  switch (dtype) {
    case DType::kFloat32: {
      auto* out = static_cast<float*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = float(in[i]);
      break;
    }
    case DType::kFloat64: {
      auto* out = static_cast<double*>(data) + offset;
      for (int64_t i = 0; i < n; ++i) out[i] = double(in[i]);
      break;
    }
    case DType::kBFloat16: {
      auto* out = static_cast<uint16_t*>(data) + offset;
      if (random) {
        for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(narrow(in[i]), random[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = float_to_bf16(narrow(in[i]));
      }
      break;
    }
    case DType::kFloat16: {
      auto* out = static_cast<uint16_t*>(data) + offset;
      if (!random) return store_fp16(out, n, in, [](T x) { return x; });
      for (int64_t i = 0; i < n; ++i) out[i] = float_to_fp16(narrow(in[i]), random[i]);
      break;
    }
    case DType::kRoot16:
      store_root16(static_cast<uint16_t*>(data) + offset, n, in, random);
      break;
    default:
      break;
  }
}

// Calls visit(position, element offset, run length, stride) for the runs that make up [offset, offset + n).
template <class Visit>
void for_each_run(const Layout& layout, int64_t offset, int64_t n, Visit&& visit) {
  int64_t index[kMaxDims];
  const int last = layout.dims - 1;
  int64_t rest = offset, at = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = rest % layout.size[d];
    rest /= layout.size[d];
    at += index[d] * layout.stride[d];
  }
  for (int64_t done = 0; done < n;) {
    int64_t run = layout.size[last] - index[last];
    if (run > n - done) run = n - done;
    visit(done, at, run, layout.stride[last]);
    done += run;
    index[last] += run;
    at += run * layout.stride[last];
    for (int d = last; d > 0 && index[d] == layout.size[d]; --d) {
      at += layout.stride[d - 1] - layout.size[d] * layout.stride[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

template <class T>
void load(const Column& column, int64_t offset, int64_t n, T* out) {
  if (!column.layout) return load_flat(column.data, column.dtype, offset, n, out);
  for_each_run(*column.layout, offset, n, [&](int64_t position, int64_t at, int64_t run, int64_t stride) {
    if (stride == 1) return load_flat(column.data, column.dtype, at, run, out + position);
    for (int64_t k = 0; k < run; ++k) load_flat(column.data, column.dtype, at + k * stride, 1, out + position + k);
  });
}

template <class T>
void store(const Column& column, int64_t offset, int64_t n, const T* in, const uint16_t* random = nullptr) {
  if (!column.layout) return store_flat(column.data, column.dtype, offset, n, in, random);
  for_each_run(*column.layout, offset, n, [&](int64_t position, int64_t at, int64_t run, int64_t stride) {
    const uint16_t* chance = random ? random + position : nullptr;
    if (stride == 1) return store_flat(column.data, column.dtype, at, run, in + position, chance);
    for (int64_t k = 0; k < run; ++k) {
      store_flat(column.data, column.dtype, at + k * stride, 1, in + position + k, chance ? chance + k : nullptr);
    }
  });
}
