// Sixteen lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

namespace {

struct Simd {
  typedef __m512 F;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kRows = 4, kTokens = 5;  // register tile of a dot product
  static constexpr size_t kDownTokens = 5, kDownVectors = 4;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // b where either is not a number.
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  // 2 * kLanes bfloat16 numbers: those at even places, those at odd ones.
  static void load_bf16(const uint16_t* p, F* even, F* odd) {
    const __m512i pairs = _mm512_loadu_si512(p);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
  // The reverse order of load_bf16's.
  static void interleave(F even, F odd, F* low, F* high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    *low = _mm512_permutex2var_ps(even, first, odd);
    *high = _mm512_permutex2var_ps(even, second, odd);
  }
  // Lanes i with first <= i <= last keep v, the others become `other`.
  static F keep(F v, int32_t first, int32_t last, F other) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask =
        static_cast<__mmask16>(_mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(first)) &
                               _mm512_cmple_epi32_mask(lane, _mm512_set1_epi32(last)));
    return _mm512_mask_blend_ps(mask, other, v);
  }
  // Lanes whose bit is set keep v, the others become zero.
  static F keep_bits(F v, uint64_t bits) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), v);
  }
  // A bit for each lane where v is not below bound.
  static uint64_t not_below(F v, F bound) { return _mm512_cmp_ps_mask(v, bound, _CMP_NLT_UQ); }
  // The lanes whose bit is set, side by side; what is behind them, up to kLanes numbers, is
  // overwritten.
  static void compress(float* p, F v, uint64_t bits) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), v));
  }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  static float largest(F v) { return _mm512_reduce_max_ps(v); }
  static F round(F v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // v * 2^n, n integral.
  static F scale_by_power(F v, F n) { return _mm512_scalef_ps(v, n); }
  static F abs(F v) { return _mm512_abs_ps(v); }
  static F load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F widen_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_int32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  // The nearest integers, which 16 bits hold, to `out`; and as numbers.
  static F round_to(F v, int16_t* out) {
    const __m512i n = _mm512_cvtps_epi32(v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(n));
    return _mm512_cvtepi32_ps(n);
  }

  // kLanes bfloat16 numbers, in their order.
  static F widen(const uint16_t* p) {
    const __m256i numbers = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
  }

  // Dot products of bytes 0 .. 255 with whole numbers of 16 bits, modulo 2^32: in each lane four
  // bytes with one quad of numbers. `put_quads` writes kLanes of these, at most kLargestCode, as
  // quads of two words each.
  typedef __m512i I;
  typedef __m512i Bytes;
  struct Dots {
    I high, low;  // of the numbers' upper bytes, of their lower ones
  };
  static constexpr float kLargestCode = 32639;  // 127 * 256 + 127: both bytes are signed
  static I to_integers(F v) { return _mm512_cvtps_epi32(v); }
  static void store_integers(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  // Modulo 2^32; _mm512_reduce_add_epi32 adds signed numbers, whose overflow is undefined.
  static int32_t sum(I v) {
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static void put_quads(int32_t* quads, I v) {
    const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
    const __m128i lows = _mm512_cvtepi32_epi8(low);
    const __m128i highs = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_sub_epi32(v, low), 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quads), _mm_unpacklo_epi32(highs, lows));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quads + 4), _mm_unpackhi_epi32(highs, lows));
  }
  static Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Dots dots(int32_t first) { return {_mm512_setzero_si512(), _mm512_set1_epi32(first)}; }
  static void add_dots(Dots* dots, Bytes bytes, const int32_t* quad) {
    dots->high = _mm512_dpbusd_epi32(dots->high, bytes, _mm512_set1_epi32(quad[0]));
    dots->low = _mm512_dpbusd_epi32(dots->low, bytes, _mm512_set1_epi32(quad[1]));
  }
  static F total(Dots dots) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(dots.high, 8), dots.low));
  }
};

}  // namespace
