// The device of cuda/device.cuh, in C++: a block's threads are fibers on one thread of the host,
// which run one after another and change over where they wait for each other. What leaves the
// memory of the device, is not aligned, or waits where others do not come, ends the launch with an
// error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__

#define SK_KERNEL(name, Args)                                                                \
  void name(const Args args);                                                                \
  static const ::sk::emulator::Registration registration_##name(                             \
      #name, [](const void* args) { name(*static_cast<const Args*>(args)); }, sizeof(Args)); \
  void name(const Args args)
#define SK_LARGE_KERNEL SK_KERNEL

using sk::emulator::blockDim;
using sk::emulator::blockIdx;
using sk::emulator::gridDim;
using sk::emulator::threadIdx;

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace sk {
namespace cuda {

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

template <typename T>
inline T read_shared(const T* at) {
  emulator::check_access(at, sizeof(T), emulator::Access::kShared);
  T v;
  std::memcpy(&v, at, sizeof(T));
  return v;
}
template <typename T>
inline T read_once(const T* at) {
  emulator::check_access(at, sizeof(T), emulator::Access::kOnce);
  T v;
  std::memcpy(&v, at, sizeof(T));
  return v;
}

inline void sync_threads() { emulator::wait_for_block(); }
inline void sync_warp() { emulator::collective(nullptr, nullptr); }

inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return out;
}
inline int32_t count_bits(uint32_t v) { return __builtin_popcount(v); }
inline float float_of_bits(uint32_t v) {
  float f;
  std::memcpy(&f, &v, sizeof(f));
  return f;
}
inline uint32_t bits_of_float(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  return bits;
}
inline float float_of_half(uint16_t v) {
  const int exponent = v >> 10 & 31, fraction = v & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                     : exponent == 31
                         ? (fraction == 0 ? INFINITY : NAN)
                         : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return v >> 15 != 0 ? -size : size;
}
inline float square_root(float v) { return std::sqrt(v); }
inline float exponential(float v) { return std::exp(v); }
inline float cosine(float v) { return std::cos(v); }
inline float sine(float v) { return std::sin(v); }
inline double logarithm(double v) { return std::log(v); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
// As the device: what is not a number becomes 0, what is too large the largest.
inline int32_t round_to_int(float v) {
  if (std::isnan(v)) return 0;
  if (v >= 2147483648.0f) return INT32_MAX;
  if (v <= -2147483648.0f) return INT32_MIN;
  return static_cast<int32_t>(std::nearbyint(v));
}
inline int32_t atomic_add_shared(int32_t* at, int32_t v) {
  const int32_t before = *at;
  *at += v;
  return before;
}

namespace lanes {

template <typename T>
struct Shuffle {
  T value, result;
  int mask;
};
template <typename T>
void shuffle(void* const (&all)[32]) {
  for (int i = 0; i < 32; ++i) {
    auto* own = static_cast<Shuffle<T>*>(all[i]);
    own->result = static_cast<Shuffle<T>*>(all[(i ^ own->mask) & 31])->value;
  }
}
struct Vote {
  bool value;
  uint32_t result;
};
inline void vote(void* const (&all)[32]) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) {
    result |= static_cast<uint32_t>(static_cast<Vote*>(all[i])->value) << i;
  }
  for (void* lane : all) static_cast<Vote*>(lane)->result = result;
}
template <typename T>
struct Mma {
  T* c;
  const uint32_t *a, *b;
};
inline void multiply_bytes(void* const (&all)[32]) {
  static uint8_t a[16][32];
  static int8_t b[8][32];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<const Mma<int32_t>*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][i / 2 * 16 + 4 * t], &own->a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&b[g][i * 16 + 4 * t], &own->b[i], 4);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* own = static_cast<Mma<int32_t>*>(all[lane]);
    for (int i = 0; i < 4; ++i) {
      const uint8_t* row = a[lane / 4 + i / 2 * 8];
      const int8_t* column = b[2 * (lane % 4) + i % 2];
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
      own->c[i] += sum;
    }
  }
}
inline void multiply_bfloat16(void* const (&all)[32]) {
  static float a[16][16], b[8][16];
  const auto number = [](uint32_t pair, int i) {
    return float_of_bits(i == 0 ? pair << 16 : pair & 0xffff0000u);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* own = static_cast<const Mma<float>*>(all[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      a[g + i / 2 % 2 * 8][i / 4 * 8 + 2 * t + i % 2] = number(own->a[i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i) b[g][i / 2 * 8 + 2 * t + i % 2] = number(own->b[i / 2], i % 2);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* own = static_cast<Mma<float>*>(all[lane]);
    for (int i = 0; i < 4; ++i) {
      const float* row = a[lane / 4 + i / 2 * 8];
      const float* column = b[2 * (lane % 4) + i % 2];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      own->c[i] += sum;
    }
  }
}

}  // namespace lanes

template <typename T>
T shuffle_xor(T v, int mask) {
  lanes::Shuffle<T> own = {v, v, mask};
  emulator::collective(lanes::shuffle<T>, &own);
  return own.result;
}
inline uint32_t ballot(bool v) {
  lanes::Vote own = {v, 0};
  emulator::collective(lanes::vote, &own);
  return own.result;
}
inline void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  lanes::Mma<int32_t> own = {c, a, b};
  emulator::collective(lanes::multiply_bytes, &own);
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  lanes::Mma<float> own = {c, a, b};
  emulator::collective(lanes::multiply_bfloat16, &own);
}

}  // namespace cuda
}  // namespace sk
