// Integer sums by VNNI: unsigned codes times signed bytes, four to a lane.
#include "codes_avx512.inl"

namespace {

struct VectorIntegers {
  static constexpr size_t kUnitBytes = 128;  // upper bytes, then lower

  template <int kBits>
  static void store_unit(const int16_t* integers, uint8_t* out) {
    if (kBits == 16) {
      split_bytes(integers, out, out + 64);
    } else {
      one_byte(integers, out);
    }
  }

  static Codes unpack(const Matrix& m, size_t row, size_t column, size_t columns, uint8_t* out) {
    return ::unpack(m, row, column, columns, out);
  }

  static Codes unpack_chosen(const Matrix& m, const uint32_t* rows, size_t count, size_t column,
                             size_t columns, uint8_t* out) {
    with_planes(m, [&](auto planes) {
      for (size_t i = 0; i < count; ++i) {
        unpack_row<decltype(planes)::value>(m, rows[i], column, columns, out + i * columns);
      }
    });
    return {out, columns};
  }

  // Of 16 rows with some units of an input.
  template <int kBits>
  static void sums(const uint8_t* codes, size_t stride, const uint8_t* input, size_t units,
                   int32_t* out) {
    __m512i acc[16];
    for (__m512i& sum : acc) sum = _mm512_setzero_si512();
    for (size_t i = 0; i < units; ++i) {
      const __m512i upper = _mm512_loadu_si512(input + i * kUnitBytes);
      for (size_t row = 0; row < 16; ++row) {
        const __m512i w = _mm512_loadu_si512(codes + row * stride + i * 64);
        acc[row] = _mm512_dpbusd_epi32(acc[row], w, upper);
      }
    }
    if constexpr (kBits == 16) {
      for (__m512i& sum : acc) sum = _mm512_slli_epi32(sum, 8);
      for (size_t i = 0; i < units; ++i) {
        const __m512i lower = _mm512_loadu_si512(input + i * kUnitBytes + 64);
        for (size_t row = 0; row < 16; ++row) {
          const __m512i w = _mm512_loadu_si512(codes + row * stride + i * 64);
          acc[row] = _mm512_dpbusd_epi32(acc[row], w, lower);
        }
      }
    }
    _mm512_storeu_si512(out, totals(acc));
  }

  // The sum of each of 16 vectors.
  static __m512i totals(const __m512i* v) {
    __m512i pairs[8], fours[4], eights[2];
    for (size_t i = 0; i < 8; ++i) {
      pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                  _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    }
    for (size_t i = 0; i < 4; ++i) {
      fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                                  _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
    }
    for (size_t i = 0; i < 2; ++i) eights[i] = halves_added(fours[2 * i], fours[2 * i + 1]);
    return halves_added(eights[0], eights[1]);
  }
  static __m512i halves_added(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  }

  typedef ActivationBytes Activations;

  static void gather(const Matrix& m, size_t neuron, size_t column, size_t columns, uint8_t* out) {
    with_planes(m, [&](auto planes) {
      gather_rows<decltype(planes)::value>(m, neuron, column, columns, out);
    });
  }
  static void gather_chosen(const Matrix& m, const ChosenRows& rows, size_t column, size_t columns,
                            uint8_t* out) {
    with_planes(m, [&](auto planes) {
      gather_chosen_rows<decltype(planes)::value>(m, rows, column, columns, out);
    });
  }

  // Moves the integers of a mask side by side, zeros behind them.
  static void side_by_side(BlockMask used, int16_t* integers) {
    __m512i all[4];
    for (size_t i = 0; i < 4; ++i) {
      const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(integers + 16 * i));
      all[i] = _mm512_cvtepi16_epi32(own);
    }
    int16_t* to = integers;
    for (size_t i = 0; i < 4; ++i) {
      const __mmask16 own = static_cast<__mmask16>(used >> 16 * i);
      const __m512i moved = _mm512_maskz_compress_epi32(own, all[i]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(moved));
      to += __builtin_popcount(own);
    }
    for (; to < integers + 48; to += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_setzero_si256());
    }
    for (; to < integers + 64; ++to) *to = 0;
  }

  template <int kBits>
  static void add_columns(const uint8_t* codes, size_t columns, size_t first, size_t n,
                          size_t neurons, const Activations& activations, size_t tokens,
                          const float* factors, float* sums) {
    add_columns_by_vectors<kBits>(codes, columns, first, n, neurons, activations, tokens, factors,
                                  sums);
  }

  static void in_order(const float* sums, float* out) { order_columns(sums, out); }
};

}  // namespace
