// Integer sums in plain C++.
#include "integer_codes.inl"

namespace {

struct Integers : WordIntegers {
  // Of 16 rows, from byte `first` on, with some units of an input.
  template <int, typename Rows>
  static void sums(const Rows& codes, size_t first, const uint8_t* input, size_t units,
                   int32_t* out) {
    const int16_t* x = reinterpret_cast<const int16_t*>(input);
    for (size_t row = 0; row < 16; ++row) {
      int32_t sum = 0;
      for (size_t i = 0; i < units * 64; ++i) sum += codes.row(row)[first + i] * x[i];
      out[row] = sum;
    }
  }

  // Of `neurons` neurons: sums[token, first ... first + n) += factor * the sum of codes and
  // activations.
  template <int>
  static void add_columns(const uint8_t* codes, size_t columns, size_t first, size_t n,
                          size_t neurons, const Activations& activations, size_t tokens,
                          const float* factors, float* sums) {
    for (size_t token = 0; token < tokens; ++token) {
      int32_t exact[128] = {};
      for (size_t i = 0; i < neurons; ++i) {
        const int32_t v = activations.values[token * 64 + i];
        const uint8_t* row = codes + i * columns + first;
        for (size_t j = 0; j < n; ++j) exact[j] += row[j] * v;
      }
      float* out = sums + token * columns + first;
      for (size_t j = 0; j < n; j += kLanes) {
        Simd::store(out + j, Simd::fma(Simd::load_int32(exact + j), Simd::set(factors[token]),
                                       Simd::load(out + j)));
      }
    }
  }
};

}  // namespace
