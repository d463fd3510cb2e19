// Dot products of rows whose codes are in planes of 4 bits, with a single token: two blocks of 64
// columns at once, unpacked in registers. A vector of 64 bytes has half of each block's codes in
// its lower nibbles and half in the upper ones; so the lower lanes of a sum are one block's, the
// upper lanes the other's. Included after integer_rows.inl.

namespace {
namespace integer {

// 128 codes of a row: {columns 0 ... 31 of both blocks, columns 32 ... 63 of both}.
struct PairCodes {
  __m512i first, second;
};

inline __m512i load_pair(const uint8_t* at, bool both) {
  if (both) return _mm512_loadu_si512(at);
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

template <Planes kPlanes>
inline PairCodes load_pair_codes(const uint8_t* codes, const uint8_t* low, bool both) {
  const __m512i nibble = _mm512_set1_epi8(15), v = load_pair(codes, both);
  if constexpr (kPlanes == Planes::k4) {
    return {_mm512_and_si512(v, nibble), _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble)};
  }
  const __m512i w = load_pair(low, both);
  // a where the mask is set, else b.
  const auto select = [&](__m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(nibble, b, a, 0xca);
  };
  return {select(_mm512_slli_epi16(v, 4), w), select(v, _mm512_srli_epi16(w, 4))};
}

// The sums of the lower and of the upper halves of 16 vectors.
struct PairSums {
  __m512i first, second;
};

inline PairSums pair_totals(const __m512i* v) {
  __m512i pairs[8], fours[4];
  for (size_t i = 0; i < 8; ++i) {
    pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
  }
  for (size_t i = 0; i < 4; ++i) {
    fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
  }
  // Lanes of 128 bits 0 and 1 are the first block's, 2 and 3 the second's.
  const __m512i a = VectorIntegers::halves_added(fours[0], fours[1]);
  const __m512i b = VectorIntegers::halves_added(fours[2], fours[3]);
  return {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)};
}

// Two blocks of an input, their halves side by side as the codes are.
struct PairInputs {
  // The first columns of a block begin at `a`, the others in the second half of `b`; those of the
  // next block are `step` bytes further.
  PairInputs(const uint8_t* a, const uint8_t* b, size_t step, bool both)
      : first(halves(a, step, both)), second(halves(b + 32, step, both)) {}
  static __m512i halves(const uint8_t* at, size_t step, bool both) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if (!both) return _mm512_zextsi256_si512(x);
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + step));
    return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
  }

  __m512i first, second;
};

// 16 rows at `rows`, in planes.
struct PairRows {
  const uint8_t *codes[kRowTile], *low[kRowTile];
};

inline void take_row(const Matrix& m, size_t row, size_t place, PairRows* rows) {
  rows->codes[place] = m.codes + row * m.stride;
  rows->low[place] = m.low + row * m.low_stride;
}

// Groups [first, last) of 16 rows; scales and offsets as dot_tile takes them.
template <int kBits, Planes kPlanes, bool kApart, typename Later>
inline void dot_pairs(const Matrix& m, const PairRows& rows, size_t first, size_t last,
                      const float* scales, const float* offsets, size_t scale_stride,
                      const uint8_t* input, bool add, float* out, const Later& ahead) {
  const float* input_scale = input_scales(m, const_cast<uint8_t*>(input));
  __m512 sums = add ? _mm512_loadu_ps(out) : _mm512_setzero_ps();
  const auto add_group = [&](size_t g, __m512i exact) {
    const size_t at = (g - first) * scale_stride;
    const __m512 v = _mm512_cvtepi32_ps(exact) * _mm512_set1_ps(input_scale[g]);
    sums = _mm512_fmadd_ps(v, _mm512_loadu_ps(scales + at), sums);
    sums = _mm512_fmadd_ps(_mm512_set1_ps(input_scale[m.groups + g]), _mm512_loadu_ps(offsets + at),
                           sums);
  };
  const size_t end = at_most(last * m.group, m.columns) / 64;
  for (size_t block = first * m.group / 64; block < end; block += 2) {
    const bool both = block + 1 < end;
    ahead.prefetch(block * 64 - first * m.group);
    // With groups of 32 the halves of a block are units of their own.
    constexpr size_t kUnits = kApart ? 2 : 1;
    const uint8_t* unit = input + block * kUnits * Integers::kUnitBytes;
    const uint8_t* other = unit + (kUnits - 1) * Integers::kUnitBytes;
    constexpr size_t kStep = kUnits * Integers::kUnitBytes;
    const PairInputs upper(unit, other, kStep, both), lower(unit + 64, other + 64, kStep, both);
    __m512i acc[2][kRowTile];  // of the first columns, if apart, and of the others or all
#pragma GCC unroll 16
    for (size_t i = 0; i < kRowTile; ++i) {
      const PairCodes w =
          load_pair_codes<kPlanes>(rows.codes[i] + block * 32, rows.low[i] + block * 32, both);
      const __m512i zero = _mm512_setzero_si512();
      __m512i a = _mm512_dpbusd_epi32(zero, w.first, upper.first);
      __m512i b = _mm512_dpbusd_epi32(kApart ? zero : a, w.second, upper.second);
      if constexpr (kBits == 16) {
        if constexpr (kApart) {
          a = _mm512_dpbusd_epi32(_mm512_slli_epi32(a, 8), w.first, lower.first);
          b = _mm512_slli_epi32(b, 8);
        } else {
          b = _mm512_dpbusd_epi32(_mm512_slli_epi32(b, 8), w.first, lower.first);
        }
        b = _mm512_dpbusd_epi32(b, w.second, lower.second);
      }
      acc[0][i] = a;
      acc[1][i] = b;
    }
    const PairSums exact = pair_totals(acc[1]);
    if constexpr (kApart) {
      const PairSums others = pair_totals(acc[0]);
      add_group(2 * block, others.first);
      add_group(2 * block + 1, exact.first);
      if (both) add_group(2 * block + 2, others.second);
      if (both) add_group(2 * block + 3, exact.second);
    } else if (m.group == 128) {
      add_group(block / 2, _mm512_add_epi32(exact.first, exact.second));
    } else {
      add_group(block, exact.first);
      if (both) add_group(block + 1, exact.second);
    }
  }
  _mm512_storeu_ps(out, sums);
}

// Whether rows of a matrix are multiplied so.
inline bool in_pairs(const Matrix& m, size_t tokens) {
  const Planes planes = planes_of(m);
  return tokens == 1 && (planes == Planes::k4 || planes == Planes::k44);
}

template <bool kApart>
struct Apart {
  static constexpr bool value = kApart;
};

template <int kBits, typename Later>
inline void dot_pair_rows(const Matrix& m, const PairRows& rows, size_t first, size_t last,
                          const float* scales, const float* offsets, size_t scale_stride,
                          const uint8_t* input, bool add, float* out, const Later& ahead) {
  const auto dot = [&](auto planes, auto apart) {
    dot_pairs<kBits, decltype(planes)::value, decltype(apart)::value>(
        m, rows, first, last, scales, offsets, scale_stride, input, add, out, ahead);
  };
  if (planes_of(m) == Planes::k4) {
    m.group == 32 ? dot(PlanesTag<Planes::k4>(), Apart<true>())
                  : dot(PlanesTag<Planes::k4>(), Apart<false>());
  } else {
    m.group == 32 ? dot(PlanesTag<Planes::k44>(), Apart<true>())
                  : dot(PlanesTag<Planes::k44>(), Apart<false>());
  }
}

template <int kBits>
void dot_in_pairs(const Matrix& m, size_t first_row, size_t rows, const uint8_t* input,
                  float* out) {
  for (size_t row = first_row; row < first_row + rows; row += kRowTile) {
    PairRows at;
    for (size_t i = 0; i < kRowTile; ++i) take_row(m, row + i, i, &at);
    for (size_t begin = 0; begin < m.columns; begin += kChunkColumns) {
      const size_t columns = at_most(kChunkColumns, m.columns - begin);
      alignas(64) float scales[kMostChunkGroups * kRowTile], offsets[kMostChunkGroups * kRowTile];
      const size_t first = begin / m.group, last = (begin + columns + m.group - 1) / m.group;
      load_scales(m, row, first, last, scales, offsets);
      dot_pair_rows<kBits>(m, at, first, last, scales, offsets, kRowTile, input, begin != 0,
                           out + row - first_row, Ahead(m, row + kRowTile, begin, true));
    }
  }
}

template <int kBits>
void dot_chosen_in_pairs(const Matrix& m, const ChosenRows& rows, const uint8_t* input, float* out,
                         Fetch* fetch) {
  alignas(64) float values[kMostChosen];
  begin_fetch(fetch, (rows.count + kRowTile - 1) / kRowTile * ((m.columns + 127) / 128));
  for (size_t begin = 0; begin < m.columns; begin += kChunkColumns) {
    const size_t columns = at_most(kChunkColumns, m.columns - begin);
    alignas(64) float scales[kMostChunkGroups * kChosenStride];
    alignas(64) float offsets[kMostChunkGroups * kChosenStride];
    const size_t first = begin / m.group, last = (begin + columns + m.group - 1) / m.group;
    load_chosen_scales(m, rows, first, last, scales, offsets);
    for (size_t i = 0; i < rows.count; i += kRowTile) {
      PairRows at;
      for (size_t j = 0; j < kRowTile; ++j) {
        take_row(m, rows.at[at_most(i + j, rows.count - 1)], j, &at);
      }
      dot_pair_rows<kBits>(m, at, first, last, scales + i, offsets + i, kChosenStride, input,
                           begin != 0, values + i, LaterRows{fetch});
    }
  }
  spread(rows, values, kMostChosen, 1, out, kMostChosen);
}

// A single token or few, by pairs where that can be.
template <int kBits>
void dot_few(const Matrix* weights, size_t first_row, size_t rows, const void* operand,
             size_t tokens, float* out, size_t out_stride) {
  if (!in_pairs(*weights, tokens)) {
    return dot<kBits>(weights, first_row, rows, operand, tokens, out, out_stride);
  }
  dot_in_pairs<kBits>(*weights, first_row, rows, static_cast<const uint8_t*>(operand), out);
}

template <int kBits>
void dot_chosen_few(const Matrix* weights, const ChosenRows* chosen, const void* operand,
                    size_t tokens, float* out, size_t out_stride, Fetch* fetch) {
  if (!in_pairs(*weights, tokens)) {
    return dot_chosen<kBits>(weights, chosen, operand, tokens, out, out_stride, fetch);
  }
  dot_chosen_in_pairs<kBits>(*weights, *chosen, static_cast<const uint8_t*>(operand), out, fetch);
}

}  // namespace integer
}  // namespace
