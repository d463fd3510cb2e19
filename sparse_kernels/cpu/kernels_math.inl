// What all of a level's kernels share, in terms of Simd. Everything is in the nameless namespace:
// no other level's code may stand in for it.
#pragma once

#include <math.h>
#include <string.h>

#include "kernels.hpp"

namespace {

using sk::AttentionChunk;
using sk::BlockMask;
using sk::ChooseTask;
using sk::Chosen;
using sk::ChosenRows;
using sk::DownTask;
using sk::Fetch;
using sk::HeadTask;
using sk::kAttentionChunk;
using sk::kAttentionRows;
using sk::Kernels;
using sk::kMaxDownNeurons;
using sk::kMostChosen;
using sk::kWholeBlock;
using sk::Matrix;
using sk::Products;
using sk::SwigluTask;

typedef Simd::F F;
constexpr size_t kLanes = Simd::kLanes;
constexpr float kInfinity = __builtin_huge_valf();

// exp(x), relative error below 2e-7 for x in [-86, 88], clamped outside; NaN stays NaN.
inline F exp_of(F x) {
  x = Simd::min(Simd::set(88.0f), Simd::max(Simd::set(-86.0f), x));
  const F n = Simd::round(x * Simd::set(1.44269504088896341f));
  F r = Simd::fma(n, Simd::set(-0.693359375f), x);
  r = Simd::fma(n, Simd::set(2.12194440e-4f), r);
  // Cephes expf.
  F p = Simd::set(1.9875691500e-4f);
  p = Simd::fma(p, r, Simd::set(1.3981999507e-3f));
  p = Simd::fma(p, r, Simd::set(8.3334519073e-3f));
  p = Simd::fma(p, r, Simd::set(4.1665795894e-2f));
  p = Simd::fma(p, r, Simd::set(1.6666665459e-1f));
  p = Simd::fma(p, r, Simd::set(5.0000001201e-1f));
  p = Simd::fma(p, r * r, r + Simd::set(1.0f));
  return Simd::scale_by_power(p, n);
}

inline size_t at_most(size_t value, size_t limit) { return value < limit ? value : limit; }

inline F silu(F gate) { return gate / (Simd::set(1.0f) + exp_of(Simd::zero() - gate)); }

inline uint16_t bf16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  // A NaN whose payload is in the lower half would round to infinity.
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_of(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline const uint16_t* bf16_row(const Matrix& matrix, size_t row) {
  return reinterpret_cast<const uint16_t*>(matrix.codes + row * matrix.stride);
}

// The bits of a mask that are set, in order: `at` those of a block, after `first`.
struct Neurons {
  Neurons() : count(0) {}
  Neurons(BlockMask mask, size_t first) : count(0) { add(mask, first); }
  void add(BlockMask mask, size_t first) {
    for (; mask != 0; mask &= mask - 1) {
      at[count++] = static_cast<uint32_t>(first) + static_cast<uint32_t>(__builtin_ctzll(mask));
    }
  }
  // As many numbers from `first` on as bits are set.
  void add_row_by_row(BlockMask mask, size_t first) {
    const size_t end = count + static_cast<size_t>(__builtin_popcountll(mask));
    for (uint32_t row = static_cast<uint32_t>(first); count < end; ++row) at[count++] = row;
  }

  size_t count;
  uint32_t at[kMaxDownNeurons];
};

// The rows of block `block` of a task that are read, those of `used`.
inline void add_rows_of(const DownTask& task, size_t block, BlockMask used, Neurons* rows) {
  if (task.places == nullptr) {
    rows->add(used, task.first_neuron + block * 64);
  } else {
    rows->add_row_by_row(used, task.places[block]);
  }
}

// Where rows were computed side by side -> their places.
inline void spread(const ChosenRows& rows, const float* values, size_t stride, size_t tokens,
                   float* out, size_t out_stride) {
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t i = 0; i < rows.count; ++i) {
      out[t * out_stride + rows.at[i] - rows.first] = values[t * stride + i];
    }
  }
}

// Shares the rows of `fetch` out among so many steps of a product.
inline void begin_fetch(Fetch* fetch, size_t steps) {
  size_t lines = 0;
  for (uint32_t i = fetch->next; i < fetch->count; ++i) lines += (fetch->rows[i].bytes + 63) / 64;
  fetch->step = static_cast<uint32_t>((lines + steps - 1) / steps);
}

// The next lines of `fetch`. Always inline, see below.
__attribute__((always_inline)) inline void fetch_some(Fetch* fetch) {
  for (uint32_t i = 0; i < fetch->step && fetch->next < fetch->count; ++i) {
    const Fetch::Rows& rows = fetch->rows[fetch->next];
#pragma GCC unroll 16
    for (uint32_t j = 0; j < 16; ++j) __builtin_prefetch(rows.at[j] + fetch->byte, 0, 2);
    fetch->byte += 64;
    if (fetch->byte < rows.bytes) continue;
    fetch->byte = 0;
    ++fetch->next;
  }
}

// Rows that will be read after others: some at a time are multiplied side by side, which is no
// order that the CPU would foresee. Beyond the last row a prefetch does nothing. Always inline: GCC
// drops calls of a function that does nothing but prefetch.
__attribute__((always_inline)) inline void prefetch_rows(const Matrix& m, size_t row, size_t rows) {
  const uint8_t* codes = m.codes + row * m.stride;
  for (size_t i = 0; i < rows * m.stride; i += 64) __builtin_prefetch(codes + i, 0, 3);
  if (m.low == nullptr) return;
  const uint8_t* low = m.low + row * m.low_stride;
  for (size_t i = 0; i < rows * m.low_stride; i += 64) __builtin_prefetch(low + i, 0, 3);
}

// A token's activations of a block -> out [64].
inline void swiglu_row(const SwigluTask& task, size_t token, float* out) {
  const float *gate = task.gate + token * task.stride, *up = task.up + token * task.stride;
  const BlockMask used = task.used == nullptr ? kWholeBlock : task.used[token];
  for (size_t i = 0; i < 64; i += kLanes) {
    const F v = silu(Simd::load(gate + i)) * Simd::load(up + i);
    Simd::store(out + i, Simd::keep_bits(v, used >> i));
  }
  if (task.plain == nullptr) return;
  memcpy(task.plain + token * task.plain_stride + task.first, out, 64 * sizeof(float));
}

}  // namespace
