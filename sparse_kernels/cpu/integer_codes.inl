// Codes of one byte from those stored in planes, in plain C++.
#pragma once

#include "kernels_math.inl"

namespace {

// 16 rows of unpacked codes.
struct Codes {
  const uint8_t* at;
  size_t stride;
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
    alignas(64) int16_t values[16 * 64];  // [token][neuron]
    template <int>
    void put(size_t token, size_t, const int16_t* integers) {
      memcpy(values + token * 64, integers, 64 * sizeof(int16_t));
    }
  };

  // Up to 16 rows.
  static Codes unpack_chosen(const Matrix& m, const uint32_t* rows, size_t count, size_t column,
                             size_t columns, uint8_t* out) {
    for (size_t i = 0; i < count; ++i) {
      for (size_t j = 0; j < columns; j += 64) {
        unpack_block(m, rows[i], (column + j) / 64, out + i * columns + j);
      }
    }
    return {out, columns};
  }

  // Codes of 64 neurons, [neuron][columns].
  static void gather(const Matrix& m, size_t neuron, size_t column, size_t columns, uint8_t* out) {
    gather_chosen(m, ChosenRows(kWholeBlock, neuron), column, columns, out);
  }
  // Of some; their number is made even.
  static void gather_chosen(const Matrix& m, const ChosenRows& rows, size_t column, size_t columns,
                            uint8_t* out) {
    for (size_t i = 0; i < rows.count; ++i) {
      for (size_t j = 0; j < columns; j += 64) {
        unpack_block(m, rows.at[i], (column + j) / 64, out + i * columns + j);
      }
    }
    memset(out + rows.count * columns, 0, rows.count % 2 * columns);
  }

  // Moves the integers of a mask side by side, zeros behind them.
  static void side_by_side(BlockMask used, int16_t* integers) {
    size_t count = 0;
    for (; used != 0; used &= used - 1) {
      integers[count++] = integers[static_cast<size_t>(__builtin_ctzll(used))];
    }
    memset(integers + count, 0, (64 - count) * sizeof(int16_t));
  }

  // A block of columns of `sums`.
  static void in_order(const float* sums, float* out) { memcpy(out, sums, 64 * sizeof(float)); }
};

}  // namespace
