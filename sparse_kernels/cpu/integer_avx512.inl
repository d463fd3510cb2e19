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

  // Up to 16 rows; the last one stands in for those that there are not.
  static ChosenCodes unpack_chosen(const Matrix& m, const uint32_t* rows, size_t count,
                                   size_t column, size_t columns, uint8_t* out) {
    const bool whole_bytes = planes_of(m) == Planes::k8;
    ChosenCodes codes;
    for (size_t i = 0; i < 16; ++i) {
      const size_t row = at_most(i, count - 1);
      codes.at[i] = whole_bytes ? m.codes + rows[row] * m.stride + column : out + row * columns;
    }
    if (!whole_bytes) copy_chosen(m, rows, count, column, columns, out);
    return codes;
  }
  // Side by side.
  static void copy_chosen(const Matrix& m, const uint32_t* rows, size_t count, size_t column,
                          size_t columns, uint8_t* out) {
    with_planes(m, [&](auto planes) {
      for (size_t i = 0; i < count; ++i) {
        unpack_row<decltype(planes)::value>(m, rows[i], column, columns, out + i * columns);
      }
    });
  }

  // Of 16 rows, from byte `first` on, with some units of an input.
  template <int kBits, typename Rows>
  static void sums(const Rows& codes, size_t first, const uint8_t* input, size_t units,
                   int32_t* out) {
    __m512i acc[16];
    for (__m512i& sum : acc) sum = _mm512_setzero_si512();
    for (size_t i = 0; i < units; ++i) {
      const __m512i upper = _mm512_loadu_si512(input + i * kUnitBytes);
      for (size_t row = 0; row < 16; ++row) {
        const __m512i w = _mm512_loadu_si512(codes.row(row) + first + i * 64);
        acc[row] = _mm512_dpbusd_epi32(acc[row], w, upper);
      }
    }
    if constexpr (kBits == 16) {
      for (__m512i& sum : acc) sum = _mm512_slli_epi32(sum, 8);
      for (size_t i = 0; i < units; ++i) {
        const __m512i lower = _mm512_loadu_si512(input + i * kUnitBytes + 64);
        for (size_t row = 0; row < 16; ++row) {
          const __m512i w = _mm512_loadu_si512(codes.row(row) + first + i * 64);
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
  static void gather_chosen(const Matrix& m, const Neurons& rows, size_t column, size_t columns,
                            uint8_t* out, Fetch* fetch) {
    with_planes(m, [&](auto planes) {
      gather_chosen_rows<decltype(planes)::value>(m, rows, column, columns, out, fetch);
    });
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
