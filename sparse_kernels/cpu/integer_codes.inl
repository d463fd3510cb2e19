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

}  // namespace
