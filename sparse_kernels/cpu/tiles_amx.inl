// The registers of AMX.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// In memory, for GCC's intrinsic tells the compiler of its first bytes alone.
const TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// GCC's tile loads and stores do not tell the compiler which memory they touch.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// The columns of 16 x 16 numbers.
inline void transpose(const float (*from)[16], __m512* to) {
  __m512 a[16], b[16];
  for (size_t i = 0; i < 16; i += 2) {
    const __m512 x = _mm512_load_ps(from[i]), y = _mm512_load_ps(from[i + 1]);
    a[i] = _mm512_unpacklo_ps(x, y);
    a[i + 1] = _mm512_unpackhi_ps(x, y);
  }
  for (size_t i = 0; i < 16; i += 4) {
    b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  // b[4 i + j], lane L: column 4 L + j of rows 4 i ... 4 i + 3.
  for (size_t j = 0; j < 4; ++j) {
    const __m512 p = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x88);
    const __m512 q = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xdd);
    const __m512 r = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x88);
    const __m512 s = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xdd);
    to[j] = _mm512_shuffle_f32x4(p, r, 0x88);
    to[4 + j] = _mm512_shuffle_f32x4(q, s, 0x88);
    to[8 + j] = _mm512_shuffle_f32x4(p, r, 0xdd);
    to[12 + j] = _mm512_shuffle_f32x4(q, s, 0xdd);
  }
}

}  // namespace
