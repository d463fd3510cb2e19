// Eight lanes of AVX2 with FMA.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

namespace {

struct Simd {
  typedef __m256 F;
  static constexpr size_t kLanes = 8;
  static constexpr size_t kRows = 4, kTokens = 2;  // register tile of a dot product
  static constexpr size_t kDownTokens = 2, kDownVectors = 4;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // b where either is not a number.
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  // 2 * kLanes bfloat16 numbers: those at even places, those at odd ones.
  static void load_bf16(const uint16_t* p, F* even, F* odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    *odd = _mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  }
  // The reverse order of load_bf16's.
  static void interleave(F even, F odd, F* low, F* high) {
    const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
    *low = _mm256_permute2f128_ps(a, b, 0x20);
    *high = _mm256_permute2f128_ps(a, b, 0x31);
  }
  // Lanes i with first <= i <= last keep v, the others become `other`.
  static F keep(F v, int32_t first, int32_t last, F other) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane);
    const __m256i above = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(last));
    return _mm256_blendv_ps(v, other, _mm256_castsi256_ps(_mm256_or_si256(below, above)));
  }
  // Lanes whose bit is set keep v, the others become zero.
  static F keep_bits(F v, uint64_t bits) {
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set =
        _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits & 255)), lanes);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lanes)));
  }
  // A bit for each lane where v is not below bound.
  static uint64_t not_below(F v, F bound) {
    return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, bound, _CMP_NLT_UQ)));
  }
  // The lanes whose bit is set, side by side; what is behind them, up to kLanes numbers, is
  // overwritten.
  static void compress(float* p, F v, uint64_t bits) {
    alignas(32) float lanes[kLanes];
    store(lanes, v);
    size_t count = 0;
    for (size_t i = 0; i < kLanes; ++i) {
      p[count] = lanes[i];
      count += bits >> i & 1;
    }
  }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static float largest(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // v * 2^n, n integral, the result a normal number.
  static F scale_by_power(F v, F n) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), bits));
  }
  static F abs(F v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
  static F load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F widen_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_int32(const int32_t* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // The nearest integers, which 16 bits hold, to `out`; and as numbers.
  static F round_to(F v, int16_t* out) {
    const __m256i n = _mm256_cvtps_epi32(v);
    const __m128i low = _mm256_castsi256_si128(n), high = _mm256_extracti128_si256(n, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_packs_epi32(low, high));
    return _mm256_cvtepi32_ps(n);
  }
  // Exact sum of 64 products; b are four times 16 bytes, `stride` apart.
  static int32_t dot_bytes(const int16_t* a, const uint8_t* b, size_t stride) {
    __m256i total = _mm256_setzero_si256();
    for (size_t i = 0; i < 4; ++i) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + i * stride));
      const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + 16 * i));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), x));
    }
    return sum(total);
  }

  // kLanes bfloat16 numbers, in their order.
  static F widen(const uint16_t* p) {
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(numbers), 16));
  }

  // Dot products of bytes 0 .. 255 with whole numbers of 16 bits, modulo 2^32: in each lane four
  // bytes with one quad of numbers. `put_quads` writes kLanes of these, at most kLargestCode, as
  // quads of two words each.
  typedef __m256i I;
  struct Bytes {
    __m256i even, odd;  // widened to 16 bits
  };
  typedef __m256i Dots;
  static constexpr float kLargestCode = 32639;
  static I to_integers(F v) { return _mm256_cvtps_epi32(v); }
  static void store_integers(int32_t* p, I v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static int32_t sum(I v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
  }
  static void put_quads(int32_t* quads, I v) {
    // The first two words of each half: numbers 0 and 2, numbers 1 and 3.
    const __m256i later = _mm256_shuffle_epi32(_mm256_slli_epi32(v, 16), 0xee);
    const __m256i pairs = _mm256_blend_epi16(v, later, 0xaa);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(quads), _mm256_castsi256_si128(pairs));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(quads + 2), _mm256_extracti128_si256(pairs, 1));
  }
  static Bytes load_bytes(const uint8_t* p) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm256_and_si256(bytes, _mm256_set1_epi16(255)), _mm256_srli_epi16(bytes, 8)};
  }
  static Dots dots(int32_t first) { return _mm256_set1_epi32(first); }
  static void add_dots(Dots* dots, Bytes bytes, const int32_t* quad) {
    const __m256i even = _mm256_madd_epi16(bytes.even, _mm256_set1_epi32(quad[0]));
    const __m256i odd = _mm256_madd_epi16(bytes.odd, _mm256_set1_epi32(quad[1]));
    *dots = _mm256_add_epi32(*dots, _mm256_add_epi32(even, odd));
  }
  static F total(Dots dots) { return _mm256_cvtepi32_ps(dots); }
};

}  // namespace
