// Codes of one byte from those stored in planes, 64 at a time, and in fours of neurons.
#pragma once

#include "kernels_math.inl"

namespace {

struct Codes {  // 16 rows
  const uint8_t* row(size_t i) const { return at + i * stride; }
  const uint8_t* at;
  size_t stride;
};
struct ChosenCodes {  // the same, anywhere
  const uint8_t* row(size_t i) const { return at[i]; }
  const uint8_t* at[16];
};

// The planes that a code's bits are in.
enum class Planes { k8, k44, k4, k31, k22, k3, k2 };

inline Planes planes_of(const Matrix& m) {
  if (m.low == nullptr) {
    return m.bits == 8   ? Planes::k8
           : m.bits == 4 ? Planes::k4
           : m.bits == 3 ? Planes::k3
                         : Planes::k2;
  }
  return m.low_bits == 4 ? Planes::k44 : m.low_bits == 1 ? Planes::k31 : Planes::k22;
}

template <Planes kPlanes>
struct PlanesTag {
  static constexpr Planes value = kPlanes;
};

// body(PlanesTag) for the planes of a matrix.
template <typename Body>
inline void with_planes(const Matrix& m, Body&& body) {
  switch (planes_of(m)) {
    case Planes::k8:
      return body(PlanesTag<Planes::k8>());
    case Planes::k44:
      return body(PlanesTag<Planes::k44>());
    case Planes::k4:
      return body(PlanesTag<Planes::k4>());
    case Planes::k31:
      return body(PlanesTag<Planes::k31>());
    case Planes::k22:
      return body(PlanesTag<Planes::k22>());
    case Planes::k3:
      return body(PlanesTag<Planes::k3>());
    case Planes::k2:
      return body(PlanesTag<Planes::k2>());
  }
}

inline __m512i words(uint16_t a, uint16_t b, uint16_t c, uint16_t d) {
  const auto all = [](uint16_t x) { return _mm_set1_epi16(static_cast<int16_t>(x)); };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(all(a)), all(b), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(all(c)), all(d), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// 64 numbers of 4 or 2 bits.
inline __m512i fours(const uint8_t* p) {
  const __m512i both =
      _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_and_si512(_mm512_srlv_epi16(both, words(0, 0, 4, 4)), _mm512_set1_epi8(15));
}
inline __m512i twos(const uint8_t* p) {
  const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_and_si512(_mm512_srlv_epi16(all, words(0, 2, 4, 6)), _mm512_set1_epi8(3));
}
// 64 bits, as zero or `value`.
inline __m512i ones(const uint8_t* p, int8_t value) {
  uint64_t bits;
  memcpy(&bits, p, sizeof(bits));
  return _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(value));
}

// Block `block` of a row, whose planes begin at `codes` and `low`.
template <Planes kPlanes>
inline __m512i load_codes(const uint8_t* codes, const uint8_t* low, size_t block) {
  if constexpr (kPlanes == Planes::k8) return _mm512_loadu_si512(codes + 64 * block);
  if constexpr (kPlanes == Planes::k4) return fours(codes + 32 * block);
  if constexpr (kPlanes == Planes::k44) {
    // No bit crosses a byte: four are shifted into four zeros.
    return _mm512_or_si512(_mm512_slli_epi16(fours(codes + 32 * block), 4),
                           fours(low + 32 * block));
  }
  if constexpr (kPlanes == Planes::k22) {
    return _mm512_or_si512(_mm512_slli_epi16(twos(codes + 16 * block), 2), twos(low + 16 * block));
  }
  if constexpr (kPlanes == Planes::k2) return twos(codes + 16 * block);
  const uint8_t* upper = codes + 24 * block;
  if constexpr (kPlanes == Planes::k3) {
    return _mm512_or_si512(_mm512_slli_epi16(twos(upper), 1), ones(upper + 16, 1));
  }
  return _mm512_or_si512(_mm512_or_si512(_mm512_slli_epi16(twos(upper), 2), ones(upper + 16, 2)),
                         ones(low + 8 * block, 1));
}

template <Planes kPlanes>
inline void unpack_row(const Matrix& m, size_t row, size_t column, size_t columns, uint8_t* out) {
  const uint8_t *codes = m.codes + row * m.stride, *low = m.low + row * m.low_stride;
  for (size_t j = 0; j < columns; j += 64) {
    _mm512_store_si512(out + j, load_codes<kPlanes>(codes, low, (column + j) / 64));
  }
}

inline Codes unpack(const Matrix& m, size_t row, size_t column, size_t columns, uint8_t* out) {
  if (planes_of(m) == Planes::k8) return {m.codes + row * m.stride + column, m.stride};
  with_planes(m, [&](auto planes) {
    for (size_t i = 0; i < 16; ++i) {
      unpack_row<decltype(planes)::value>(m, row + i, column, columns, out + i * columns);
    }
  });
  return {out, columns};
}

constexpr size_t kAheadNeurons = 16;  // between what is read and what is fetched

// A block of columns of four neurons side by side, in vectors 1024 bytes apart.
template <Planes kPlanes>
inline void interleave_four(const uint8_t* const* codes, const uint8_t* const* low, size_t block,
                            uint8_t* to) {
  __m512i row[4];
  for (size_t i = 0; i < 4; ++i) row[i] = load_codes<kPlanes>(codes[i], low[i], block);
  const __m512i a = _mm512_unpacklo_epi8(row[0], row[1]), b = _mm512_unpackhi_epi8(row[0], row[1]);
  const __m512i c = _mm512_unpacklo_epi8(row[2], row[3]), d = _mm512_unpackhi_epi8(row[2], row[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(a, c));
  _mm512_store_si512(to + 1024, _mm512_unpackhi_epi16(a, c));
  _mm512_store_si512(to + 2048, _mm512_unpacklo_epi16(b, d));
  _mm512_store_si512(to + 3072, _mm512_unpackhi_epi16(b, d));
}

// Codes of 64 neurons, four neurons side by side: [columns / 16][16 fours of neurons][16
// columns][4]. Vector j of a block of 64 columns has columns 4 j ... 4 j + 3 of each 16.
template <Planes kPlanes>
inline void gather_rows(const Matrix& m, size_t neuron, size_t column, size_t columns,
                        uint8_t* out) {
  for (size_t four = 0; four < 16; ++four, out += 64) {
    const uint8_t *codes[4], *low[4];
    for (size_t i = 0; i < 4; ++i) {
      codes[i] = m.codes + (neuron + 4 * four + i) * m.stride;
      low[i] = m.low + (neuron + 4 * four + i) * m.low_stride;
    }
    uint8_t* to = out;
    for (size_t j = 0; j < columns; j += 64, to += 4096) {
      for (size_t i = 0; i < 4; ++i) {
        __builtin_prefetch(codes[i] + kAheadNeurons * m.stride + (column + j) * m.bits / 8, 0, 2);
      }
      interleave_four<kPlanes>(codes, low, (column + j) / 64, to);
    }
  }
}

// The same of some neurons, whose number is made a multiple of four by the last one again. Without
// `fetch` they are next to each other, as all are.
template <Planes kPlanes>
inline void gather_chosen_rows(const Matrix& m, const Neurons& rows, size_t column, size_t columns,
                               uint8_t* out, Fetch* fetch) {
  for (size_t first = 0; first < rows.count; first += 4, out += 64) {
    if (fetch != nullptr) fetch_some(fetch);
    const size_t ahead = fetch != nullptr ? 0 : kAheadNeurons * m.stride;
    const uint8_t *codes[4], *low[4];
    for (size_t i = 0; i < 4; ++i) {
      const size_t row = rows.at[at_most(first + i, rows.count - 1)];
      codes[i] = m.codes + row * m.stride;
      low[i] = m.low + row * m.low_stride;
    }
    uint8_t* to = out;
    for (size_t j = 0; j < columns; j += 64, to += 4096) {
      for (size_t i = 0; i < 4 && ahead != 0; ++i) {
        __builtin_prefetch(codes[i] + ahead + (column + j) * m.bits / 8, 0, 2);
      }
      interleave_four<kPlanes>(codes, low, (column + j) / 64, to);
    }
  }
}

// 64 columns in the order of their vectors above -> in their own.
inline void order_columns(const float* sums, float* out) {
  const __m512 a = _mm512_loadu_ps(sums), b = _mm512_loadu_ps(sums + 16);
  const __m512 c = _mm512_loadu_ps(sums + 32), d = _mm512_loadu_ps(sums + 48);
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
  const __m512 ef = _mm512_shuffle_f32x4(a, b, 0xee), gh = _mm512_shuffle_f32x4(c, d, 0xee);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(ab, cd, 0x88));
  _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(ab, cd, 0xdd));
  _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(ef, gh, 0x88));
  _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(ef, gh, 0xdd));
}

// 64 integers as upper and lower signed bytes: 256 upper + lower. They are read in the pieces that
// Simd::round_to writes: others would wait until they have reached the cache.
inline void split_bytes(const int16_t* integers, uint8_t* upper, uint8_t* lower) {
  for (size_t i = 0; i < 64; i += 16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers + i));
    const __m256i high = _mm256_srai_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(128)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(upper + i), _mm256_cvtepi16_epi8(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lower + i), _mm256_cvtepi16_epi8(v));
  }
}
inline void one_byte(const int16_t* integers, uint8_t* out) {
  for (size_t i = 0; i < 64; i += 16) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtepi16_epi8(v));
  }
}

inline __m512i join(__m256i low, __m256i high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// 64 integers, 32 in each, modulo 256.
inline __m512i to_bytes(__m512i a, __m512i b) {
  return join(_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b));
}

// Bytes of a mask side by side, zeros behind them.
inline __m512i side_by_side(BlockMask used, __m512i bytes) {
#ifdef __AVX512VBMI2__
  return _mm512_maskz_compress_epi8(used, bytes);
#else
  if (used == kWholeBlock) return bytes;
  alignas(64) uint8_t from[64], to[64 + 16] = {};
  _mm512_store_si512(from, bytes);
  size_t count = 0;
  for (size_t i = 0; i < 64; i += 16) {
    const __mmask16 own = static_cast<__mmask16>(used >> i);
    const __m512i all = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<__m128i*>(from + i)));
    const __m128i kept = _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(own, all));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + count), kept);
    count += static_cast<size_t>(__builtin_popcount(own));
  }
  return _mm512_load_si512(to);
#endif
}

// Activations of a block of neurons: those of 16 tokens, upper bytes then lower; up to 8 tokens'
// upper and lower bytes are one tile.
struct ActivationBytes {
  alignas(64) uint8_t bytes[2 * 1024];

  static size_t low_at(size_t tokens) { return tokens <= 8 ? 512 : 1024; }
  // Rounds a token's 64 activations and moves those of a mask side by side, zeros behind them; the
  // sum of activations times zeros, which are four times 16 bytes, `stride` apart. All in
  // registers: a load of what was stored in other pieces would wait until it is in the cache.
  template <int kBits>
  int32_t put(size_t token, size_t tokens, const __m512* activations, BlockMask used,
              const uint8_t* zeros, size_t stride) {
    const auto words = [&](size_t i) {
      return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(activations[i]));
    };
    const auto products = [&](size_t i, __m512i integers) {
      const auto load = [&](size_t at) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + at * stride));
      };
      const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(i + 1), 1);
      return _mm512_madd_epi16(_mm512_cvtepu8_epi16(both), integers);
    };
    const __m512i a = join(words(0), words(1)), b = join(words(2), words(3));
    uint8_t* at = bytes + token * 64;
    if (kBits == 16) {
      const auto upper = [](__m512i v) {
        return _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8);
      };
      _mm512_store_si512(at, side_by_side(used, to_bytes(upper(a), upper(b))));
      at += low_at(tokens);
    }
    _mm512_store_si512(at, side_by_side(used, to_bytes(a, b)));
    return Simd::sum(_mm512_add_epi32(products(0, a), products(2, b)));
  }
};

// Where columns [first, first + n) of a block are in its vectors: a group of 32 is one half of
// each.
inline __mmask16 lanes_of(size_t first, size_t n) {
  if (n != 32) return 0xffff;
  return first % 64 == 0 ? 0x00ff : 0xff00;
}

// Four vectors of columns for kTokens tokens, by VNNI: sums[token][64] += factor * exact.
template <int kBits, size_t kTokens>
inline void add_vectors(const uint8_t* codes, size_t fours, const uint8_t* upper,
                        const uint8_t* lower, const float* factors, __mmask16 lanes, float* sums,
                        size_t stride) {
  __m512i high[kTokens][4], low[kTokens][4];
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t i = 0; i < 4; ++i) high[t][i] = low[t][i] = _mm512_setzero_si512();
  }
  for (size_t four = 0; four < fours; ++four) {
    __m512i w[4];
    for (size_t i = 0; i < 4; ++i) w[i] = _mm512_load_si512(codes + i * 1024 + four * 64);
    for (size_t t = 0; t < kTokens; ++t) {
      const auto inputs = [&](const uint8_t* bytes) {
        int32_t x;
        memcpy(&x, bytes + t * 64 + four * 4, sizeof(x));
        return _mm512_set1_epi32(x);
      };
      const __m512i a = inputs(upper);
      for (size_t i = 0; i < 4; ++i) high[t][i] = _mm512_dpbusd_epi32(high[t][i], w[i], a);
      if constexpr (kBits == 16) {
        const __m512i b = inputs(lower);
        for (size_t i = 0; i < 4; ++i) low[t][i] = _mm512_dpbusd_epi32(low[t][i], w[i], b);
      }
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t i = 0; i < 4; ++i) {
      __m512i exact = high[t][i];
      if constexpr (kBits == 16) exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), low[t][i]);
      float* out = sums + t * stride + 16 * i;
      const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(factors[t]),
                                         _mm512_loadu_ps(out));
      _mm512_mask_storeu_ps(out, lanes, sum);
    }
  }
}

template <int kBits>
inline void add_columns_by_vectors(const uint8_t* codes, size_t columns, size_t first, size_t n,
                                   size_t neurons, const ActivationBytes& activations,
                                   size_t tokens, const float* factors, float* sums) {
  const size_t fours = (neurons + 3) / 4;
  const uint8_t* upper = activations.bytes;
  const uint8_t* lower = upper + ActivationBytes::low_at(tokens);
  const __mmask16 lanes = lanes_of(first, n);
  for (size_t column = first / 64 * 64; column < first + n; column += 64) {
    const uint8_t* at = codes + column * 64;
    size_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
      add_vectors<kBits, 2>(at, fours, upper + t * 64, lower + t * 64, factors + t, lanes,
                            sums + t * columns + column, columns);
    }
    if (t < tokens) {
      add_vectors<kBits, 1>(at, fours, upper + t * 64, lower + t * 64, factors + t, lanes,
                            sums + t * columns + column, columns);
    }
  }
}

}  // namespace
