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

// Inputs [begin, begin + 32) of n, zero beyond: where they are, or a copy in `padded`.
inline const float* tile_inputs(const float* x, size_t begin, size_t n, float* padded) {
  if (begin + 32 <= n) return x + begin;
  for (size_t i = 0; i < 32; ++i) padded[i] = begin + i < n ? x[begin + i] : 0.0f;
  return padded;
}

// Rounded to bfloat16 in the upper half of each lane; the lower half holds anything.
inline __m512i round_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// 32 columns of two rows that were unpacked as 16-bit pairs, {0-3, 8-11, ...} and {4-7, 12-15,
// ...}, in their order; with `add`, to what is there.
inline void put_columns(__m512 low, __m512 high, bool add, float* out) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  __m512 left = _mm512_permutex2var_ps(low, first, high);
  __m512 right = _mm512_permutex2var_ps(low, second, high);
  if (add) {
    left = _mm512_loadu_ps(out) + left;
    right = _mm512_loadu_ps(out + 16) + right;
  }
  _mm512_storeu_ps(out, left);
  _mm512_storeu_ps(out + 16, right);
}

}  // namespace
