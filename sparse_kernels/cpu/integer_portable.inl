// Integer sums in plain C++; inputs are 16-bit integers whatever their bits.
#include "integer_codes.inl"

namespace {

struct Integers {
  static constexpr size_t kUnitBytes = 64 * sizeof(int16_t);

  template <int>
  static void store_unit(const int16_t* integers, uint8_t* out) {
    memcpy(out, integers, kUnitBytes);
  }

  static Codes unpack(const Matrix& m, size_t row, size_t column, size_t columns, uint8_t* out) {
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < columns; j += 64) {
        unpack_block(m, row + i, (column + j) / 64, out + i * columns + j);
      }
    }
    return {out, columns};
  }

  // Of 16 rows with some units of an input.
  template <int>
  static void sums(const uint8_t* codes, size_t stride, const uint8_t* input, size_t units,
                   int32_t* out) {
    const int16_t* x = reinterpret_cast<const int16_t*>(input);
    for (size_t row = 0; row < 16; ++row) {
      int32_t sum = 0;
      for (size_t i = 0; i < units * 64; ++i) sum += codes[row * stride + i] * x[i];
      out[row] = sum;
    }
  }

  // Of a block of neurons.
  struct Activations {
    alignas(64) int16_t values[16 * 64];  // [token][neuron]
    template <int>
    void put(size_t token, size_t, const int16_t* integers) {
      memcpy(values + token * 64, integers, 64 * sizeof(int16_t));
    }
  };

  // Codes of 64 neurons, [neuron][columns].
  static void gather(const Matrix& m, size_t neuron, size_t column, size_t columns, uint8_t* out) {
    for (size_t i = 0; i < 64; ++i) {
      for (size_t j = 0; j < columns; j += 64) {
        unpack_block(m, neuron + i, (column + j) / 64, out + i * columns + j);
      }
    }
  }

  // sums[token, first ... first + n) += factor * the sum of codes and activations.
  template <int>
  static void add_columns(const uint8_t* codes, size_t columns, size_t first, size_t n,
                          const Activations& activations, size_t tokens, const float* factors,
                          float* sums) {
    for (size_t token = 0; token < tokens; ++token) {
      int32_t exact[128] = {};
      for (size_t i = 0; i < 64; ++i) {
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

  // A block of columns of `sums`.
  static void in_order(const float* sums, float* out) { memcpy(out, sums, 64 * sizeof(float)); }
};

}  // namespace
