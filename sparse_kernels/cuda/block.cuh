// What kernels of rows are made of: numbers, and sums and choices of a whole warp or block in a
// fixed order.
#pragma once

#include "rounding.cuh"

namespace sk {
namespace cuda {

__device__ inline uint32_t lane() { return threadIdx.x % 32; }
__device__ inline uint32_t warp() { return threadIdx.x / 32; }

__device__ inline float larger_of(float a, float b) { return a > b ? a : b; }
// |v|, or infinity where v is not a number or too large.
__device__ inline float magnitude_of(float v) {
  const float size = v < 0 ? -v : v;
  return size <= kLargestFinite ? size : float_of_bits(kInfinityBits);
}

__device__ inline float low_bfloat16(uint32_t pair) { return float_of_bits(pair << 16); }
__device__ inline float high_bfloat16(uint32_t pair) { return float_of_bits(pair & 0xffff0000u); }

__device__ inline float4 load4(const float* at) { return *reinterpret_cast<const float4*>(at); }

__device__ inline float warp_sum(float v) {
  for (int mask = 16; mask != 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
__device__ inline float warp_largest(float v) {
  for (int mask = 16; mask != 0; mask /= 2) v = larger_of(v, shuffle_xor(v, mask));
  return v;
}

__device__ inline float block_sum(float v) {
  __shared__ float sums[kWarps];
  v = warp_sum(v);
  sync_threads();  // all have read the sums of the call before
  if (lane() == 0) sums[warp()] = v;
  sync_threads();
  float total = 0;
  for (int i = 0; i < kWarps; ++i) total += sums[i];
  return total;
}

__device__ inline float sum_of_squares(const float* x, uint32_t n) {
  float sum = 0;
  for (uint32_t i = threadIdx.x; i < n; i += kThreads) sum += x[i] * x[i];
  return block_sum(sum);
}

// Which of some numbers are the largest: those above `least`, and `equal` of the `ties` that equal
// it.
struct Largest {
  uint32_t least, equal, ties;
};

// Where the wanted-th largest is when there are own() numbers with the digit of each thread; this
// digit, and what is left to choose among its numbers.
__device__ inline void choose_digit(const int32_t* bins, uint32_t wanted, Largest* chosen) {
  __shared__ uint32_t totals[kWarps];
  const uint32_t own = static_cast<uint32_t>(bins[threadIdx.x]);
  uint32_t total = own;
  for (int mask = 16; mask != 0; mask /= 2) total += shuffle_xor(total, mask);
  if (lane() == 0) totals[warp()] = total;
  sync_threads();
  uint32_t above = 0;  // with larger digits
  for (uint32_t i = warp() + 1; i < kWarps; ++i) above += totals[i];
  for (uint32_t i = threadIdx.x + 1; i < 32 * (warp() + 1); ++i) {
    above += static_cast<uint32_t>(bins[i]);
  }
  if (above < wanted && above + own >= wanted) *chosen = {threadIdx.x, wanted - above, own};
  sync_threads();
}

// The `wanted` largest, at least 1 and no more than there are, of the keys that key_of(i, &key)
// gives for i in [0, n); false: i has none.
template <typename KeyOf>
__device__ inline Largest find_largest(uint32_t n, uint32_t wanted, const KeyOf& key_of) {
  __shared__ int32_t bins[kThreads];  // by digits of 8 bits
  __shared__ Largest chosen;
  Largest found = {0, wanted, 0};
  for (int shift = 24; shift >= 0; shift -= 8) {
    sync_threads();
    bins[threadIdx.x] = 0;
    sync_threads();
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
      uint32_t key;
      if (!key_of(i, &key) || (uint64_t{key} >> (shift + 8)) != found.least) continue;
      atomic_add_shared(&bins[key >> shift & 255u], 1);
    }
    sync_threads();
    choose_digit(bins, found.equal, &chosen);
    found = {found.least << 8 | chosen.least, chosen.equal, chosen.ties};
  }
  return found;
}

}  // namespace cuda
}  // namespace sk
