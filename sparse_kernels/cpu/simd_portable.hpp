// Four lanes of the compiler's own vectors: runs everywhere.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace {

struct Simd {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  static constexpr size_t kLanes = 4;
  static constexpr size_t kRows = 4, kTokens = 2;  // register tile of a dot product
  static constexpr size_t kDownTokens = 2, kDownVectors = 4;

  static F zero() { return F{}; }
  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, F v) { memcpy(p, &v, sizeof(v)); }
  static F fma(F a, F b, F c) { return a * b + c; }
  // b where either is not a number.
  static F max(F a, F b) {
    const I a_larger = a > b;
    return reinterpret_cast<F>((reinterpret_cast<I>(a) & a_larger) |
                               (reinterpret_cast<I>(b) & ~a_larger));
  }
  static F min(F a, F b) {
    const I a_smaller = a < b;
    return reinterpret_cast<F>((reinterpret_cast<I>(a) & a_smaller) |
                               (reinterpret_cast<I>(b) & ~a_smaller));
  }
  // 2 * kLanes bfloat16 numbers: those at even places, those at odd ones.
  static void load_bf16(const uint16_t* p, F* even, F* odd) {
    I pairs;
    memcpy(&pairs, p, sizeof(pairs));
    *even = reinterpret_cast<F>(pairs << 16);
    *odd = reinterpret_cast<F>(pairs & static_cast<int32_t>(0xffff0000u));
  }
  // The reverse order of load_bf16's.
  static void interleave(F even, F odd, F* low, F* high) {
    *low = F{even[0], odd[0], even[1], odd[1]};
    *high = F{even[2], odd[2], even[3], odd[3]};
  }
  // Lanes i with first <= i <= last keep v, the others become `other`.
  static F keep(F v, int32_t first, int32_t last, F other) {
    const I lane = {0, 1, 2, 3};
    const I mask = (lane >= first) & (lane <= last);
    return reinterpret_cast<F>((reinterpret_cast<I>(v) & mask) |
                               (reinterpret_cast<I>(other) & ~mask));
  }
  // Lanes whose bit is set keep v, the others become zero.
  static F keep_bits(F v, uint64_t bits) {
    F kept = {};
    for (size_t i = 0; i < kLanes; ++i) kept[i] = bits >> i & 1 ? v[i] : 0.0f;
    return kept;
  }
  // A bit for each lane where v is not below bound.
  static uint64_t not_below(F v, F bound) {
    uint64_t bits = 0;
    for (size_t i = 0; i < kLanes; ++i) bits |= uint64_t{!(v[i] < bound[i])} << i;
    return bits;
  }
  // The lanes whose bit is set, side by side; what is behind them, up to kLanes numbers, is
  // overwritten.
  static void compress(float* p, F v, uint64_t bits) {
    size_t count = 0;
    for (size_t i = 0; i < kLanes; ++i) {
      p[count] = v[i];
      count += bits >> i & 1;
    }
  }
  static float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float largest(F v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
  }
  // To the nearest integer, |v| < 2^22.
  static F round(F v) {
    const F magic = set(12582912.0f);
    return (v + magic) - magic;
  }
  // v * 2^n, n integral, the result a normal number.
  static F scale_by_power(F v, F n) {
    const F magic = set(12582912.0f);
    const I bits = reinterpret_cast<I>(n + magic) << 23;  // the low bits hold n
    return reinterpret_cast<F>(reinterpret_cast<I>(v) + bits);
  }
  static F abs(F v) { return reinterpret_cast<F>(reinterpret_cast<I>(v) & 0x7fffffff); }
  static F load_half(const uint16_t* p) {
    return F{half(p[0]), half(p[1]), half(p[2]), half(p[3])};
  }
  static F widen_bytes(const uint8_t* p) {
    return __builtin_convertvector(I{p[0], p[1], p[2], p[3]}, F);
  }
  static F load_int32(const int32_t* p) {
    I v;
    memcpy(&v, p, sizeof(v));
    return __builtin_convertvector(v, F);
  }
  // The nearest integers, which 16 bits hold, to `out`; and as numbers.
  static F round_to(F v, int16_t* out) {
    v = round(v);
    for (size_t i = 0; i < kLanes; ++i) out[i] = static_cast<int16_t>(v[i]);
    return v;
  }
  // Exact sum of 64 products; b are four times 16 bytes, `stride` apart.
  static int32_t dot_bytes(const int16_t* a, const uint8_t* b, size_t stride) {
    int32_t total = 0;
    for (size_t i = 0; i < 64; ++i) total += a[i] * b[i / 16 * stride + i % 16];
    return total;
  }
  // A finite float16.
  static float half(uint16_t x) {
    const uint32_t magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
    float value;
    memcpy(&value, &magnitude, sizeof(value));
    value *= 5.192296858534828e33f;  // 2^112: the exponent's bias, right for subnormal numbers too
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    bits |= sign;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }

  // kLanes bfloat16 numbers, in their order.
  static F widen(const uint16_t* p) {
    const U bits = {p[0], p[1], p[2], p[3]};
    return reinterpret_cast<F>(bits << 16);
  }

  // Dot products of bytes 0 .. 255 with whole numbers of 16 bits, modulo 2^32: in each lane four
  // bytes with one quad of numbers. `put_quads` writes kLanes of these, at most kLargestCode, as
  // quads of two words each.
  typedef U Bytes;
  typedef U Dots;
  static constexpr float kLargestCode = 32639;
  // To the nearest integer, from 2^22 on to one of the nearest; of what 32 bits do not hold, some.
  static I to_integers(F v) {
    const F magic = set(12582912.0f);
    return __builtin_convertvector((v + magic) - magic, I);
  }
  static void store_integers(int32_t* p, I v) { memcpy(p, &v, sizeof(v)); }
  static I add(I a, I b) {
    return reinterpret_cast<I>(reinterpret_cast<U>(a) + reinterpret_cast<U>(b));
  }
  static int32_t sum(I v) {
    const U u = reinterpret_cast<U>(v);
    return static_cast<int32_t>(u[0] + u[1] + u[2] + u[3]);
  }
  static void put_quads(int32_t* quads, I v) {
    const int16_t numbers[4] = {static_cast<int16_t>(v[0]), static_cast<int16_t>(v[1]),
                                static_cast<int16_t>(v[2]), static_cast<int16_t>(v[3])};
    memcpy(quads, numbers, sizeof(numbers));
  }
  static Bytes load_bytes(const uint8_t* p) {
    U bytes;
    memcpy(&bytes, p, sizeof(bytes));
    return bytes;
  }
  static Dots dots(int32_t first) {
    const uint32_t u = static_cast<uint32_t>(first);
    return Dots{u, u, u, u};
  }
  static void add_dots(Dots* dots, Bytes bytes, const int32_t* quad) {
    int16_t numbers[4];
    memcpy(numbers, quad, sizeof(numbers));
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t number = static_cast<uint32_t>(int32_t{numbers[i]});
      *dots += (bytes >> (8 * i) & 255u) * number;
    }
  }
  static F total(Dots dots) { return __builtin_convertvector(reinterpret_cast<I>(dots), F); }
};

}  // namespace
