// Integer sums by products of 16-bit pairs.
#include "integer_codes.inl"

namespace {

struct Integers : WordIntegers {
  static __m256i widened(const uint8_t* p) {
    return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // Of 16 rows, from byte `first` on, with some units of an input.
  template <int, typename Rows>
  static void sums(const Rows& codes, size_t first, const uint8_t* input, size_t units,
                   int32_t* out) {
    const int16_t* x = reinterpret_cast<const int16_t*>(input);
    for (size_t half = 0; half < 16; half += 8) {
      __m256i acc[8];
      for (__m256i& sum : acc) sum = _mm256_setzero_si256();
      for (size_t i = 0; i < units * 64; i += 16) {
        const __m256i inputs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
        for (size_t row = 0; row < 8; ++row) {
          const __m256i w = widened(codes.row(half + row) + first + i);
          acc[row] = _mm256_add_epi32(acc[row], _mm256_madd_epi16(w, inputs));
        }
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + half), totals(acc));
    }
  }

  // The sum of each of 8 vectors.
  static __m256i totals(const __m256i* v) {
    __m256i pairs[4], quads[2];
    for (size_t i = 0; i < 4; ++i) pairs[i] = _mm256_hadd_epi32(v[2 * i], v[2 * i + 1]);
    for (size_t i = 0; i < 2; ++i) quads[i] = _mm256_hadd_epi32(pairs[2 * i], pairs[2 * i + 1]);
    return _mm256_add_epi32(_mm256_permute2x128_si256(quads[0], quads[1], 0x20),
                            _mm256_permute2x128_si256(quads[0], quads[1], 0x31));
  }

  // Of `neurons` neurons: sums[token, first ... first + n) += factor * the sum of codes and
  // activations.
  template <int>
  static void add_columns(const uint8_t* codes, size_t columns, size_t first, size_t n,
                          size_t neurons, const Activations& activations, size_t tokens,
                          const float* factors, float* sums) {
    for (size_t column = first; column < first + n; column += 32) {
      for (size_t token = 0; token < tokens; ++token) {
        __m256i acc[4];  // columns 0-7, 8-15, 16-23, 24-31
        for (__m256i& sum : acc) sum = _mm256_setzero_si256();
        for (size_t i = 0; i < neurons; i += 2) {
          int32_t pair;
          memcpy(&pair, activations.values + token * 64 + i, sizeof(pair));
          const __m256i v = _mm256_set1_epi32(pair);
          for (size_t j = 0; j < 2; ++j) {
            const uint8_t* at = codes + i * columns + column + 16 * j;
            const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
            const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + columns));
            const __m256i low = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(a, b));
            const __m256i high = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(a, b));
            acc[2 * j] = _mm256_add_epi32(acc[2 * j], _mm256_madd_epi16(low, v));
            acc[2 * j + 1] = _mm256_add_epi32(acc[2 * j + 1], _mm256_madd_epi16(high, v));
          }
        }
        float* out = sums + token * columns + column;
        for (size_t i = 0; i < 4; ++i) {
          const F v = _mm256_cvtepi32_ps(acc[i]);
          Simd::store(out + 8 * i,
                      Simd::fma(v, Simd::set(factors[token]), Simd::load(out + 8 * i)));
        }
      }
    }
  }
};

}  // namespace
