// Heads after their projection, and the KV cache. A head of a KV block:
//
// - of bfloat16: keys [dim / 2][16 positions][2 dimensions], values [8 pairs of positions][dim]
//   [2 positions];
// - of bytes, number + 128: keys [dim / 4][16 positions][4 dimensions], values [4 quads of
//   positions][dim][4 positions], and bfloat16 scales, 16 of the keys and 16 of the values.
//
// What stands beyond a token's own position may be anything: it is never multiplied.
#pragma once

#include "block.cuh"
#include "positions.cuh"

namespace sk {
namespace cuda {

constexpr float kLeastKvScale = 1e-30f;  // what is smaller counts as zero
constexpr uint32_t kKvZero = 128;

// A head of a row between projection and where it goes.
struct Head {
  const float *x, *bias, *norm, *cos, *sin;  // but for x, null: none
  float factor, scale;
  uint32_t half;  // head_dim / 2
};

__device__ inline float biased(const Head& head, uint32_t i) {
  const float v = read_shared(head.x + i);
  return head.bias == nullptr ? v : v + read_shared(head.bias + i);
}
__device__ inline float normed(const Head& head, uint32_t i) {
  const float v = biased(head, i);
  return head.norm == nullptr ? v : v * head.factor * read_shared(head.norm + i);
}
// RoPE: the halves of a head are the pairs. Zero beyond the head.
__device__ inline float finished(const Head& head, uint32_t i) {
  if (i >= 2 * head.half) return 0;
  if (head.cos == nullptr) return normed(head, i);
  const bool second = i >= head.half;
  const uint32_t pair = second ? i - head.half : i;
  const float cos = read_shared(head.cos + pair), sin = read_shared(head.sin + pair);
  const float own = normed(head, i), other = normed(head, second ? pair : pair + head.half);
  return (second ? own * cos + other * sin : own * cos - other * sin) * head.scale;
}

__device__ inline void set_norm(const float* norm, float eps, Head* head) {
  if (norm == nullptr) return;
  float squares = 0;
  for (uint32_t i = lane(); i < 2 * head->half; i += 32) {
    const float v = biased(*head, i);
    squares += v * v;
  }
  const float mean = warp_sum(squares) / static_cast<float>(2 * head->half);
  head->norm = norm;
  head->factor = 1.0f / square_root(mean + eps);
}

// A key or value -> its place in the block of its position; only its own bytes are written.
__device__ inline void append_bfloat16(const Head& head, bool is_key, uint32_t dim, uint32_t offset,
                                       uint8_t* block) {
  uint16_t* numbers = reinterpret_cast<uint16_t*>(block);
  for (uint32_t i = lane(); i < dim; i += 32) {
    const uint32_t place = is_key ? (i / 2 * 16 + offset) * 2 + i % 2
                                  : 16 * dim + (offset / 2 * dim + i) * 2 + offset % 2;
    numbers[place] = static_cast<uint16_t>(bfloat16_of(finished(head, i)));
  }
}
__device__ inline void append_bytes(const Head& head, bool is_key, uint32_t dim, uint32_t offset,
                                    uint8_t* block) {
  float top = 0;
  for (uint32_t i = lane(); i < dim; i += 32) {
    top = larger_of(top, magnitude_of(finished(head, i)));
  }
  top = warp_largest(top);
  if (!(top <= kLargestFinite)) top = float_of_bits(0x7fc00000u);
  const uint32_t stored = bfloat16_of(top / 127.0f);
  const float scale = low_bfloat16(stored);
  const float factor = scale > kLeastKvScale ? 1.0f / scale : 0.0f;
  for (uint32_t i = lane(); i < dim; i += 32) {
    const uint32_t place = is_key ? (i / 4 * 16 + offset) * 4 + i % 4
                                  : 16 * dim + (offset / 4 * dim + i) * 4 + offset % 4;
    const int32_t code = factor == 0 ? 0 : round_to_int(finished(head, i) * factor);
    block[place] = static_cast<uint8_t>(kKvZero + static_cast<uint32_t>(code));
  }
  if (lane() != 0) return;
  reinterpret_cast<uint16_t*>(block + 32 * dim)[is_key ? offset : 16 + offset] =
      static_cast<uint16_t>(stored);
}

__device__ inline const int32_t* blocks_of(const int32_t* tables, const uint32_t* begin,
                                           uint32_t sequence) {
  return tables + read_shared(begin + sequence);
}

SK_KERNEL(finish_heads, HeadsArgs) {
  const uint32_t index = blockIdx.x, row = blockIdx.y * kWarps + warp();
  if (row >= args.rows) return;
  const uint32_t all = args.heads + 2 * args.kv_heads, half = args.head_dim / 2;
  const bool is_query = index < args.heads,
             is_key = !is_query && index < args.heads + args.kv_heads;
  Head head = {};
  head.x = args.projected + (uint64_t{row} * all + index) * args.dim;
  head.half = half;
  head.scale = is_query ? args.scale : 1.0f;
  if (args.bias != nullptr) head.bias = args.bias + uint64_t{index} * args.dim;
  if (is_query || is_key) {
    set_norm(is_query ? args.q_norm : args.k_norm, args.eps, &head);
    head.cos = args.cos + uint64_t{row} * half;
    head.sin = args.sin + uint64_t{row} * half;
  }
  if (is_query) {
    float* to = args.queries + (uint64_t{row} * args.heads + index) * args.dim;
    for (uint32_t i = lane(); i < args.dim; i += 32) to[i] = finished(head, i);
    return;
  }
  const uint32_t position = read_shared(&args.tokens[row].position);
  const int32_t* table =
      blocks_of(args.block_tables, args.table_begin, read_shared(&args.tokens[row].sequence));
  const uint64_t block =
      static_cast<uint64_t>(read_shared(table + position / kBlockPositions)) * args.kv_heads +
      (index - args.heads) % args.kv_heads;
  uint8_t* to = args.kv + block * args.kv_head_bytes;
  if (args.kv_bits == 16) {
    append_bfloat16(head, is_key, args.dim, position % kBlockPositions, to);
  } else {
    append_bytes(head, is_key, args.dim, position % kBlockPositions, to);
  }
}

}  // namespace cuda
}  // namespace sk
