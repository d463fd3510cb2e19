// What attention is made of whatever the format of the KV cache. Included after kernels_common.inl
// and before the formats, attention_bfloat16.inl and attention_int8.inl.
#include "kernels.hpp"

namespace {

using sk::AttentionChunk;
using sk::kAttentionChunk;
using sk::kAttentionRows;
using sk::kMaxHeadDim;

// The chunk's KV block of this index.
inline const uint8_t* block_of(const AttentionChunk& chunk, size_t index) {
  return chunk.kv +
         static_cast<size_t>(chunk.block_table[chunk.begin / 16 + index]) * chunk.block_stride;
}

constexpr size_t kBlocksAhead = 3;

// Fetches a part of the block that is read kBlocksAhead blocks later. The hardware's own
// prefetching ends with each page. Always inline: GCC drops calls of a function that does nothing
// but prefetch.
__attribute__((always_inline)) inline void prefetch(const AttentionChunk& chunk, size_t index,
                                                    size_t offset, size_t bytes) {
  index += kBlocksAhead;
  if (chunk.begin + index * 16 >= chunk.seen_end) return;
  const uint8_t* at = block_of(chunk, index) + offset;
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 3);
}

inline size_t blocks_of(const AttentionChunk& chunk) { return (chunk.end - chunk.begin + 15) / 16; }

// Of positions [i, i + kLanes) of the chunk those that the row sees keep v, the others become
// `other`.
inline F keep_seen(const AttentionChunk& chunk, size_t row, size_t i, F v, float other) {
  const int32_t position = static_cast<int32_t>(chunk.begin + i);
  return Simd::keep(v, chunk.first[row] - position, chunk.last[row] - position, Simd::set(other));
}

// Calls store(i, weights) for all vectors of positions: exp(score - largest) of what the row sees,
// zero of the rest.
template <typename Store>
inline void softmax_row(const AttentionChunk& chunk, size_t row, const float* scores,
                        const Store& store) {
  const size_t width = blocks_of(chunk) * 16;
  F largest = Simd::set(-kInfinity);
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = keep_seen(chunk, row, i, Simd::load(scores + i), -kInfinity);
    largest = Simd::max(largest, v);
  }
  const float top = Simd::largest(largest);
  F total = Simd::zero();
  for (size_t i = 0; i < width; i += kLanes) {
    const F v = keep_seen(chunk, row, i, exp_of(Simd::load(scores + i) - Simd::set(top)), 0);
    total = total + v;
    store(i, v);
  }
  chunk.largest[row] = top;
  chunk.total[row] = Simd::sum(total);
}

}  // namespace
