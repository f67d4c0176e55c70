// A column during a chunk, whatever form its elements have: codes, roots, pieces, or plain numbers.
//
// Included once into each instruction set's translation unit, inside an anonymous namespace. Blocks begin at multiples
// of kBlock in a row, so that they are whole blocks of codes.
static_assert(kBlock % kCodeBlock == 0);

// What the compiler knows: a count of elements, and whether something is so.
struct WholeCodeBlock {
  constexpr operator int64_t() const { return kCodeBlock; }
};
template <bool kValue>
struct Truth {
  static constexpr bool value = kValue;
};

// The scale of the block that begins at an element.
FUSEDOPT_HD uint16_t* scale_at(const Column& column, int64_t numel, int64_t offset) {
  return reinterpret_cast<uint16_t*>(static_cast<char*>(column.data) + scales_at(numel)) + offset / kCodeBlock;
}

// Calls visit(begin, count) for the blocks of codes of n elements.
template <class Visit>
FUSEDOPT_HD void for_each_code_block(int64_t n, const Visit& visit) {
  int64_t begin = 0;
  for (; begin + kCodeBlock <= n; begin += kCodeBlock) visit(begin, WholeCodeBlock());
  if (begin < n) visit(begin, n - begin);
}

template <class T>
void load_coded(const Column& column, int64_t numel, int64_t offset, int64_t n, T* __restrict out) {
  const uint8_t* codes = static_cast<const uint8_t*>(column.data) + offset;
  const bool is_unsigned = column.dtype == DType::kUnsigned8;
  for_each_code_block(n, [&](int64_t begin, auto count) __attribute__((always_inline)) {
    const float scale = bf16_to_float(*scale_at(column, numel, offset + begin));
    const uint8_t* from = codes + begin;
    T* to = out + begin;
    if (is_unsigned) {
      for (int64_t i = 0; i < count; ++i) to[i] = T(decode_unsigned(from[i], scale));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = T(decode_signed(from[i], scale));
    }
  });
}

// The largest magnitude; NaN where one is NaN. As integers, floats without a sign have the order of their bits.
template <class Count>
FUSEDOPT_HD float largest_magnitude(const float* x, Count n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_to_bits(x[i]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return bits_to_float(most);
}

template <class T>
void store_coded(const Column& column, int64_t numel, int64_t offset, int64_t n, const T* __restrict in,
                 const uint16_t* __restrict random) {
  uint8_t* codes = static_cast<uint8_t*>(column.data) + offset;
  const bool is_unsigned = column.dtype == DType::kUnsigned8;
  float narrowed[sizeof(T) == 4 ? 1 : kBlock];
  const float* values = narrowed;
  if constexpr (sizeof(T) == 4) {
    values = in;
  } else {
    for (int64_t i = 0; i < n; ++i) narrowed[i] = float(in[i]);
  }
  // All scales before the first code: each takes a chain of operations that wait for one another.
  constexpr int64_t kBlocks = kBlock / kCodeBlock;
  float largest[kBlocks] = {}, inverse[kBlocks];
  uint16_t scale[kBlocks];
  for_each_code_block(n, [&](int64_t begin, auto count) __attribute__((always_inline)) {
    largest[begin / kCodeBlock] = largest_magnitude(values + begin, count);
  });
  for (int64_t b = 0; b < kBlocks; ++b) {
    scale[b] = is_unsigned ? scale_of<UnsignedCode>(largest[b]) : scale_of<SignedCode>(largest[b]);
  }
  for (int64_t b = 0; b < kBlocks; ++b) inverse[b] = inverse_scale(scale[b]);
  __builtin_memcpy(scale_at(column, numel, offset), scale, static_cast<size_t>((n + kCodeBlock - 1) / kCodeBlock) * 2);
  for_each_code_block(n, [&](int64_t begin, auto count) __attribute__((always_inline)) {
    const float by = inverse[begin / kCodeBlock], *from = values + begin;
    uint8_t* to = codes + begin;
    if (is_unsigned) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = encode_unsigned(from[i], by, code_rounding<UnsignedCode>(random[begin + i]));
      }
    } else if (random) {
      for (int64_t i = 0; i < count; ++i) {
        to[i] = encode_signed(from[i], by, code_rounding<SignedCode>(random[begin + i]));
      }
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = encode_signed(from[i], by, code_rounding<SignedCode>());
    }
  });
}

// What blocks of a row need to know to be rounded by chance.
struct Rounding {
  const Chance* chance;  // null where nothing is
  uint32_t step;
  uint16_t bits[kBlock];

  bool asked() const { return chance && chance->rounds; }

  // The random bits of a column's elements.
  const uint16_t* of(uint32_t column, int64_t offset, int64_t n) {
    random_block(*chance, column, step, offset, n, bits);
    return bits;
  }
};

// A column during a chunk: used in place when it is flat and already of type T, else through a block buffer.
template <class T>
struct Window {
  Column column;
  int64_t numel;
  bool direct;
  T block[kBlock];

  void open(const TensorRow& row, const Column& c, DType native) {
    column = c;
    numel = row.numel;
    direct = !c.layout && c.dtype == native;
  }
  T* load_at(int64_t offset, int64_t n) {
    if (direct) return static_cast<T*>(column.data) + offset;
    if (is_coded(column.dtype)) {
      load_coded(column, numel, offset, n, block);
    } else {
      load(column, offset, n, block);
    }
    return block;
  }
  void store_at(int64_t offset, int64_t n, Rounding& rounding, uint32_t number) {
    if (direct) return;
    const uint16_t* random =
        rounds_by_chance(column.dtype, rounding.asked()) ? rounding.of(number, offset, n) : nullptr;
    if (is_coded(column.dtype)) return store_coded(column, numel, offset, n, block, random);
    store(column, offset, n, block, random);
  }
};

// The parameter of a row with a master: together they are a float32.
struct Mastered {
  Column param, master;
  float block[kBlock], shown[kBlock];

  void open(const TensorRow& row) {
    param = row.param;
    master = row.carried->master;
  }

  // Calls visit(position, run, first piece, stride) for the pieces of [offset, offset + n), in their own type.
  template <class Piece, class Visit>
  void for_each_piece(int64_t offset, int64_t n, const Visit& visit) {
    Piece* pieces = static_cast<Piece*>(master.data);
    if (!master.layout) return visit(int64_t(0), n, pieces + offset, int64_t(1));
    for_each_run(*master.layout, offset, n, [&](int64_t position, int64_t at, int64_t run, int64_t stride) {
      visit(position, run, pieces + at, stride);
    });
  }

  float* load_at(int64_t offset, int64_t n) {
    load(param, offset, n, shown);
    if (master.dtype == DType::kLow16) {
      for_each_piece<uint16_t>(offset, n, [&](int64_t position, int64_t run, const uint16_t* piece, int64_t stride) {
        for (int64_t i = 0; i < run; ++i) {
          block[position + i] = join_pieces(float_to_bits(shown[position + i]), int16_t(piece[i * stride]));
        }
      });
    } else if (master.dtype == DType::kLow8) {
      for_each_piece<uint8_t>(offset, n, [&](int64_t position, int64_t run, const uint8_t* piece, int64_t stride) {
        for (int64_t i = 0; i < run; ++i) {
          block[position + i] = join_pieces(float_to_bits(shown[position + i]), int8_t(piece[i * stride]) * 256);
        }
      });
    } else {
      // Where the parameter is not the master's rounding, somebody has changed it, and it is what counts.
      const float* full = static_cast<const float*>(master.data) + offset;
      if (master.layout) {
        load(master, offset, n, block);
        full = block;
      }
      uint16_t halves[kBlock], copied[kBlock];
      store_flat<float>(halves, param.dtype, 0, n, full, nullptr);
      const uint16_t* found = static_cast<const uint16_t*>(param.data) + offset;
      if (param.layout) {
        store_flat<float>(copied, param.dtype, 0, n, shown, nullptr);
        found = copied;
      }
      for (int64_t i = 0; i < n; ++i) block[i] = halves[i] == found[i] ? full[i] : shown[i];
    }
    return block;
  }

  void store_at(int64_t offset, int64_t n, Rounding& rounding) {
    if (master.dtype == DType::kFloat32) {
      store(param, offset, n, block);
      return store(master, offset, n, block);
    }
    if (master.dtype == DType::kLow8) {
      if (rounding.asked()) {
        const uint16_t* random = rounding.of(0, offset, n);
        for (int64_t i = 0; i < n; ++i) block[i] = bits_to_float(round_to_24(plain_bits(block[i]), random[i]));
      } else {
        for (int64_t i = 0; i < n; ++i) block[i] = bits_to_float(round_to_24(plain_bits(block[i])));
      }
      for_each_piece<uint8_t>(offset, n, [&](int64_t position, int64_t run, uint8_t* piece, int64_t stride) {
        for (int64_t i = 0; i < run; ++i) piece[i * stride] = uint8_t(plain_bits(block[position + i]) >> 8);
      });
    } else {
      for_each_piece<uint16_t>(offset, n, [&](int64_t position, int64_t run, uint16_t* piece, int64_t stride) {
        for (int64_t i = 0; i < run; ++i) piece[i * stride] = uint16_t(plain_bits(block[position + i]));
      });
    }
    if (!param.layout) {
      uint16_t* high = static_cast<uint16_t*>(param.data) + offset;
      for (int64_t i = 0; i < n; ++i) high[i] = high_piece(plain_bits(block[i]));
      return;
    }
    for (int64_t i = 0; i < n; ++i) shown[i] = bits_to_float(uint32_t(high_piece(plain_bits(block[i]))) << 16);
    store(param, offset, n, shown);
  }
};

// Fetches what a later block needs of a column.
[[gnu::always_inline]] inline void prefetch(const Column& column, int64_t offset, int64_t n) {
  if (!column.data || column.layout) return;
  const int64_t size = element_size(column.dtype);
  const char* data = static_cast<const char*>(column.data) + offset * size;
  for (int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(data + byte);
}

// Takes a block of what the weights are now into their average.
template <class T>
void average_block(const Column& column, int64_t offset, int64_t n, const T* values, T weight) {
  auto take = [&](T* __restrict averages) {
    const T* __restrict from = values;
    if (weight == T(1)) {
      for (int64_t i = 0; i < n; ++i) averages[i] = from[i];
    } else if (weight < T(0.5)) {
      for (int64_t i = 0; i < n; ++i) averages[i] = averaged<T, true>(averages[i], from[i], weight);
    } else {
      for (int64_t i = 0; i < n; ++i) averages[i] = averaged<T, false>(averages[i], from[i], weight);
    }
  };
  if (!column.layout && column.dtype == (sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64)) {
    return take(static_cast<T*>(column.data) + offset);
  }
  T block[kBlock];
  load(column, offset, n, block);
  take(block);
  store(column, offset, n, block);
}
