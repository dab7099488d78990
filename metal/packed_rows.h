// Dot products with packed rows, shared by centroid_scores and cluster_logits.
//
// A row is a run of chunks: as many neighbouring values as one thread handles. A tile is
// some rows, one after the other in memory or picked from a list. Thread t of a
// threadgroup takes chunks t, t + threads, t + 2 * threads, ... of it. As `threads` is a
// whole number of rows, a thread meets the same column in every row: it holds one piece
// of the hidden state in registers, and lanes side by side read side by side, whatever
// the row's length.
//
//   row . x = sum over groups g of: scale[g] * sum(q * x) + bias[g] * sum(x)

template <int Bits>
struct Chunk {
  enum : int {
    // 16 bytes where 32 bits are a multiple of Bits; else the least whole words.
    Words = Bits == 2 ? 2 : (32 % Bits == 0 ? 4 : Bits),
    Values = Words * 32 / Bits,
    FieldsPerWord = 32 / Bits
  };
};

// Lanes side by side that hold one row's chunks and can be added up by shuffles:
// the largest power of two that divides the number of chunks of a row, at most 32.
METAL_FUNC constexpr int lanes_to_fold(int chunks_per_row) {
  return (chunks_per_row & -chunks_per_row) < 32 ? (chunks_per_row & -chunks_per_row)
                                                 : 32;
}

template <int Fold>
METAL_FUNC float fold_lanes(float value) {
  for (ushort step = 1; step < Fold; step *= 2) {
    value += simd_shuffle_xor(value, step);
  }
  return value;
}

// The two stored 16-bit floats of a word; the second argument only tells their type.
METAL_FUNC float2 two_floats(uint word, bfloat16_t) {
  return float2(as_type<float>(word << 16), as_type<float>(word & 0xffff0000u));
}
METAL_FUNC float2 two_floats(uint word, float16_t) {
  const half2 pair = as_type<half2>(word);
  return float2(float(pair.x), float(pair.y));
}

template <int Words>
METAL_FUNC void load_words(const device uint* from, thread uint* words) {
  if constexpr (Words % 4 == 0) {
    const uint4 quad = *(const device uint4*)from;
    words[0] = quad.x;
    words[1] = quad.y;
    words[2] = quad.z;
    words[3] = quad.w;
  } else if constexpr (Words % 2 == 0) {
    for (int i = 0; i < Words; i += 2) {
      const uint2 pair = *(const device uint2*)(from + i);
      words[i] = pair.x;
      words[i + 1] = pair.y;
    }
  } else {
    for (int i = 0; i < Words; ++i) {
      words[i] = from[i];
    }
  }
}

// Value i of a chunk of Bits-wide integers; it may straddle two words.
template <int Bits>
METAL_FUNC uint unpack(const thread uint* words, int i) {
  const int bit = i * Bits;
  uint value = words[bit / 32] >> (bit % 32);
  if (bit % 32 + Bits > 32) {
    value |= words[bit / 32 + 1] << (32 - bit % 32);
  }
  return value & ((1u << Bits) - 1u);
}

// One thread's piece of a hidden state.
template <int Bits>
struct HiddenChunk {
  enum : int {
    Values = Chunk<Bits>::Values,
    Fields = Chunk<Bits>::FieldsPerWord,
    IsInPlace = Bits < 16 && 32 % Bits == 0
  };

  float values[Values];
  float total;

  // Where an integer is used in place, as the word has it, it is too large by a power
  // of two; the hidden state is made as much smaller, which costs nothing per row.
  static METAL_FUNC float field_size(int i) {
    return IsInPlace ? float(1u << ((i % Fields) * Bits % 32)) : 1.0f;
  }

  template <typename T>
  METAL_FUNC void load(const device T* from) thread {
    total = 0.0f;
    for (int i = 0; i < Values; i += 4) {
      const vec<T, 4> quad = *(const device vec<T, 4>*)(from + i);
      for (int j = 0; j < 4; ++j) {
        const float value = float(quad[j]);
        total += value;
        values[i + j] = value * (1.0f / field_size(i + j));
      }
    }
  }
};

// `Passes` chunks of packed rows, held by one thread: in registers, if loops over passes
// are unrolled.
template <typename W, int Bits, int GroupSize, int Passes>
struct RowTile {
  enum : int {
    Words = Chunk<Bits>::Words,
    Values = Chunk<Bits>::Values,
    Fields = Chunk<Bits>::FieldsPerWord,
    ChunksPerGroup = GroupSize > Values ? GroupSize / Values : 1
  };

  uint words[Passes][Words];
  float scales[Passes];
  float biases[Passes];

  // Reads one chunk; one that is not there counts as zeros. The first lane of a group
  // reads its scale and bias for the others.
  template <typename S>
  METAL_FUNC void load(
      int pass,
      const device W* weight,
      S group_scales,
      S group_biases,
      uint chunk,
      bool is_there) thread {
    for (int i = 0; i < Words; ++i) {
      words[pass][i] = 0;
    }
    if (is_there) {
      load_words<Words>((const device uint*)weight + chunk * Words, words[pass]);
    }
    if constexpr (GroupSize > 0) {
      const bool is_first = is_there && chunk % ChunksPerGroup == 0;
      const uint group = chunk / ChunksPerGroup;
      scales[pass] = is_first ? float(group_scales[group]) : 0.0f;
      biases[pass] = is_first ? float(group_biases[group]) : 0.0f;
    }
  }

  // After all loads, so that none waits for another: hands the scales on. Lanes of a
  // group are neighbours, and their number divides 32.
  METAL_FUNC void share_scales(ushort lane) thread {
    if constexpr (GroupSize > 0 && ChunksPerGroup > 1) {
      const ushort source = lane - lane % ChunksPerGroup;
      for (int pass = 0; pass < Passes; ++pass) {
        scales[pass] = simd_shuffle(scales[pass], source);
        biases[pass] = simd_shuffle(biases[pass], source);
      }
    }
  }

  METAL_FUNC float dot(int pass, const thread HiddenChunk<Bits>& hidden) const thread {
    if constexpr (Bits >= 16) {
      return float_dot(pass, hidden);
    } else {
      return affine_dot(pass, hidden);
    }
  }

 private:
  METAL_FUNC float affine_dot(int pass, const thread HiddenChunk<Bits>& hidden) const thread {
    const float scale = scales[pass];
    const float bias = biases[pass];
    float sum = 0.0f;
    if (isfinite(hidden.total)) {
      for (int i = 0; i < Values; ++i) {
        sum += hidden.values[i] * float(field(pass, i));
      }
      return scale * sum + bias * hidden.total;
    }
    // With an infinity the factored form has inf * 0 and inf - inf where the weight
    // itself, scale * q + bias, gives a plain infinity.
    for (int i = 0; i < Values; ++i) {
      const float value = hidden.values[i] * HiddenChunk<Bits>::field_size(i);
      sum += value * (scale * float(unpack<Bits>(words[pass], i)) + bias);
    }
    return sum;
  }

  // Value i, times HiddenChunk::field_size(i).
  METAL_FUNC uint field(int pass, int i) const thread {
    if constexpr (32 % Bits == 0) {
      return words[pass][i / Fields] & (((1u << Bits) - 1u) << (i % Fields * Bits));
    } else {
      return unpack<Bits>(words[pass], i);
    }
  }

  METAL_FUNC float float_dot(int pass, const thread HiddenChunk<Bits>& hidden) const thread {
    float sum = 0.0f;
    for (int i = 0; i < Words; ++i) {
      if constexpr (Bits == 32) {
        sum += hidden.values[i] * as_type<float>(words[pass][i]);
      } else {
        const float2 pair = two_floats(words[pass][i], W());
        sum += hidden.values[2 * i] * pair.x;
        sum += hidden.values[2 * i + 1] * pair.y;
      }
    }
    return sum;
  }
};

// Puts the sums of one pass of a tile, with one position's hidden state, where row_sum
// finds them. Whole simdgroups call it; a barrier stands before row_sum.
template <int ChunksPerRow, int RowsPerPass, typename Tile, typename Hidden>
METAL_FUNC void write_partial_sum(
    const thread Tile& tile,
    const thread Hidden& hidden,
    int pass,
    uint thread_index,
    threadgroup float* partial_sums) {
  constexpr int fold = lanes_to_fold(ChunksPerRow);
  const float sum = fold_lanes<fold>(tile.dot(pass, hidden));
  if (thread_index % fold == 0) {
    partial_sums[(pass * RowsPerPass * ChunksPerRow + thread_index) / fold] = sum;
  }
}

// The dot product of row `row` of the tile, always added in the same order.
template <int ChunksPerRow>
METAL_FUNC float row_sum(const threadgroup float* partial_sums, uint row) {
  constexpr int parts = ChunksPerRow / lanes_to_fold(ChunksPerRow);
  float sum = 0.0f;
  for (int i = 0; i < parts; ++i) {
    sum += partial_sums[row * parts + i];
  }
  return sum;
}
