// Codes of one byte from those stored in planes, in plain C++.
#pragma once

#include "kernels_math.inl"

namespace {

// 16 rows of unpacked codes.
struct Codes {
  const uint8_t* row(size_t i) const { return at + i * stride; }
  const uint8_t* at;
  size_t stride;
};
// The same, anywhere.
struct ChosenCodes {
  const uint8_t* row(size_t i) const { return at[i]; }
  const uint8_t* at[16];
};

// Block `block` (64 columns) of a row of a plane.
inline void unpack_plane(const uint8_t* row, uint32_t bits, size_t block, uint8_t* out) {
  const uint8_t* from = row + block * bits * 8;
  if (bits == 8) memcpy(out, from, 64);
  if (bits == 4) {
    for (size_t i = 0; i < 32; ++i) {
      out[i] = from[i] & 15;
      out[i + 32] = static_cast<uint8_t>(from[i] >> 4);
    }
  }
  if (bits == 2 || bits == 3) {
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < 4; ++j) out[i + 16 * j] = (from[i] >> 2 * j) & 3;
    }
  }
  if (bits == 1 || bits == 3) {
    const uint8_t* lowest = from + (bits == 3 ? 16 : 0);
    for (size_t i = 0; i < 64; ++i) {
      const uint8_t bit = (lowest[i / 8] >> i % 8) & 1;
      out[i] = static_cast<uint8_t>(bits == 3 ? out[i] * 2 + bit : bit);
    }
  }
}

inline void unpack_block(const Matrix& m, size_t row, size_t block, uint8_t* out) {
  unpack_plane(m.codes + row * m.stride, m.bits, block, out);
  if (m.low == nullptr) return;
  alignas(64) uint8_t low[64];
  unpack_plane(m.low + row * m.low_stride, m.low_bits, block, low);
  for (size_t i = 0; i < 64; ++i) out[i] = static_cast<uint8_t>((out[i] << m.low_bits) | low[i]);
}

// What levels without products of bytes have in common: inputs are 16-bit integers whatever their
// bits, codes of neurons stand row after row.
struct WordIntegers {
  static constexpr size_t kUnitBytes = 64 * sizeof(int16_t);

  template <int>
  static void store_unit(const int16_t* integers, uint8_t* out) {
    memcpy(out, integers, kUnitBytes);
  }

  static Codes unpack(const Matrix& m, size_t row, size_t column, size_t columns, uint8_t* out) {
    if (m.bits == 8) return {m.codes + row * m.stride + column, m.stride};
    for (size_t i = 0; i < 16; ++i) {
      for (size_t j = 0; j < columns; j += 64) {
        unpack_block(m, row + i, (column + j) / 64, out + i * columns + j);
      }
    }
    return {out, columns};
  }

  // Of a block of neurons.
  struct Activations {
    // Rounds a token's 64 activations and moves those of a mask side by side, zeros behind them;
    // the sum of activations times zeros, which are four times 16 bytes, `stride` apart.
    template <int>
    int32_t put(size_t token, size_t, const F* activations, BlockMask used, const uint8_t* zeros,
                size_t stride) {
      alignas(64) int16_t integers[64];
      for (size_t i = 0; i < 64; i += kLanes) Simd::round_to(activations[i / kLanes], integers + i);
      int16_t* to = values + token * 64;
      memset(to, 0, 64 * sizeof(int16_t));
      for (; used != 0; used &= used - 1) *to++ = integers[__builtin_ctzll(used)];
      return Simd::dot_bytes(integers, zeros, stride);
    }

    alignas(64) int16_t values[16 * 64];  // [token][neuron]
  };

  // Up to 16 rows; the last one stands in for those that there are not.
  static ChosenCodes unpack_chosen(const Matrix& m, const uint32_t* rows, size_t count,
                                   size_t column, size_t columns, uint8_t* out) {
    ChosenCodes codes;
    for (size_t i = 0; i < 16; ++i) {
      const size_t row = i < count ? i : count - 1;
      codes.at[i] = m.bits == 8 ? m.codes + rows[row] * m.stride + column : out + row * columns;
      for (size_t j = 0; j < columns && m.bits != 8 && i < count; j += 64) {
        unpack_block(m, rows[i], (column + j) / 64, out + i * columns + j);
      }
    }
    return codes;
  }

  // Codes of 64 neurons, [neuron][columns].
  static void gather(const Matrix& m, size_t neuron, size_t column, size_t columns, uint8_t* out) {
    gather_chosen(m, Neurons(kWholeBlock, neuron), column, columns, out, nullptr);
  }
  // Of some; their number is made even.
  static void gather_chosen(const Matrix& m, const Neurons& rows, size_t column, size_t columns,
                            uint8_t* out, Fetch*) {
    for (size_t i = 0; i < rows.count; ++i) {
      for (size_t j = 0; j < columns; j += 64) {
        unpack_block(m, rows.at[i], (column + j) / 64, out + i * columns + j);
      }
    }
    memset(out + rows.count * columns, 0, rows.count % 2 * columns);
  }

  // A block of columns of `sums`.
  static void in_order(const float* sums, float* out) { memcpy(out, sums, 64 * sizeof(float)); }
};

}  // namespace
