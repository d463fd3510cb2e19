// How numbers are rounded, as the CPU does it.
#pragma once

// clang-format off: NVRTC has the types of arguments.hpp from device.cuh
#include "device.cuh"
#include "arguments.hpp"
// clang-format on

namespace sk {
namespace cuda {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kLargestFinite = 3.4e38f;  // of numbers that are rounded to integers

// To the nearest, ties to even. A NaN whose payload is in the lower half would round to infinity.
__device__ inline uint32_t bfloat16_of(float v) {
  const uint32_t bits = bits_of_float(v);
  if ((bits & 0x7fffffffu) > kInfinityBits) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// What makes integers of numbers up to `top`, and numbers of the integers; whoever depends on a
// number that is not finite gets none. See scale_for in integer.inl of the CPU.
struct Scale {
  float to, from;
};
__device__ inline Scale scale_for(float top, uint32_t activation_bits) {
  const float limit = activation_bits == 16 ? 32512.0f : 127.0f;
  if (!(top <= kLargestFinite)) return {0.0f, float_of_bits(0x7fc00000u)};
  if (top < 1e-30f) return {0.0f, 0.0f};
  return {limit / top, top / limit};
}

}  // namespace cuda
}  // namespace sk
