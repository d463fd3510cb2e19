// attend, see AttendArgs: attention over the KV cache, whose blocks heads.cuh describes.
#pragma once

#include "heads.cuh"

namespace sk {
namespace cuda {

// Of a head of a KV block, four dimensions of a key, and kPositions of one dimension of the values;
// scales are those of whole numbers.
struct KvBfloat16 {
  static constexpr uint32_t kPositions = 2;
  static __device__ inline void key(const uint8_t* head, uint32_t position, uint32_t d,
                                    float (&out)[4]) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(head) + d / 2 * 16 + position;
    const uint32_t first = read_once(pairs), second = read_once(pairs + 16);
    out[0] = low_bfloat16(first);
    out[1] = high_bfloat16(first);
    out[2] = low_bfloat16(second);
    out[3] = high_bfloat16(second);
  }
  static __device__ inline void value(const uint8_t* head, uint32_t dim, uint32_t tuple, uint32_t d,
                                      float (&out)[2]) {
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(head + 32 * dim);
    const uint32_t pair = read_once(pairs + tuple * dim + d);
    out[0] = low_bfloat16(pair);
    out[1] = high_bfloat16(pair);
  }
  static __device__ inline float key_scale(const uint8_t*, uint32_t, uint32_t) { return 1; }
  static __device__ inline float value_scale(const uint8_t*, uint32_t, uint32_t) { return 1; }
};

struct KvBytes {
  static constexpr uint32_t kPositions = 4;
  static __device__ inline void numbers(const uint32_t* at, float (&out)[4]) {
    const uint32_t bytes = read_once(at);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {  // 2^23 + byte, less 2^23 and the zero
      out[i] = float_of_bits(byte_perm(bytes, 0x4b000000u, 0x7440u | i)) - 8388736.0f;
    }
  }
  static __device__ inline void key(const uint8_t* head, uint32_t position, uint32_t d,
                                    float (&out)[4]) {
    numbers(reinterpret_cast<const uint32_t*>(head) + d / 4 * 16 + position, out);
  }
  static __device__ inline void value(const uint8_t* head, uint32_t dim, uint32_t tuple, uint32_t d,
                                      float (&out)[4]) {
    numbers(reinterpret_cast<const uint32_t*>(head + 16 * dim) + tuple * dim + d, out);
  }
  static __device__ inline float scale(const uint8_t* head, uint32_t dim, uint32_t place) {
    return low_bfloat16(read_shared(reinterpret_cast<const uint16_t*>(head + 32 * dim) + place));
  }
  static __device__ inline float key_scale(const uint8_t* head, uint32_t dim, uint32_t position) {
    return scale(head, dim, position);
  }
  static __device__ inline float value_scale(const uint8_t* head, uint32_t dim, uint32_t position) {
    return scale(head, dim, 16 + position);
  }
};

// Dimensions at once: of queries in shared memory, and of values, one for each thread.
constexpr uint32_t kPiece = kThreads;
constexpr uint32_t kMostHeads = kWarps;  // at once: a warp for the softmax of each

// What a row sees of one chunk of a KV head.
struct Seen {
  const uint8_t* blocks[kChunk / kBlockPositions];  // of what is seen alone
  uint32_t first, last;                             // of the chunk's positions
};

struct AttendSpace {
  Seen seen;
  alignas(16) float queries[kMostHeads * kPiece];  // [heads][kPiece]; then values, [parts][heads]
  float scores[2][kMostHeads][kChunk];             // halves of the dot products; then weights
};

__device__ inline void find_blocks(const AttendArgs& args, uint32_t chunk, uint32_t position,
                                   Seen* seen) {
  const uint32_t begin = chunk * kChunk, from = first_seen(position, args.window);
  const uint32_t first = from > begin ? from - begin : 0;
  const uint32_t last = position - begin < kChunk ? position - begin : kChunk - 1;
  const uint32_t i = threadIdx.x;
  if (i >= first / kBlockPositions && i <= last / kBlockPositions) {
    const int32_t* table = blocks_of(args.block_tables, args.table_begin,
                                     read_shared(&args.tokens[blockIdx.z].sequence));
    const uint64_t block =
        static_cast<uint64_t>(read_shared(table + begin / kBlockPositions + i)) * args.kv_heads;
    seen->blocks[i] = args.kv + (block + blockIdx.y) * args.kv_head_bytes;
  }
  if (i == 0) {
    seen->first = first;
    seen->last = last;
  }
  sync_threads();
}

// Half a dot product of each position with the queries: threads of the upper half of the block take
// the upper half of the dimensions of each piece.
template <typename Kv, uint32_t kHeads>
__device__ inline void score(const AttendArgs& args, const float* queries, uint32_t heads,
                             AttendSpace* space) {
  const uint32_t position = threadIdx.x % kChunk, part = threadIdx.x / kChunk;
  const bool sees = position >= space->seen.first && position <= space->seen.last;
  const uint8_t* block = sees ? space->seen.blocks[position / kBlockPositions] : nullptr;
  float sums[kHeads] = {};
  for (uint32_t begin = 0; begin < args.dim; begin += kPiece) {
    const uint32_t width = args.dim - begin < kPiece ? args.dim - begin : kPiece;
    sync_threads();
    for (uint32_t i = threadIdx.x; i < heads * width; i += kThreads) {
      const uint32_t head = i / width, d = i % width;
      space->queries[head * kPiece + d] = read_shared(queries + head * args.dim + begin + d);
    }
    sync_threads();
    if (!sees) continue;
    const uint32_t end = (part + 1) * width / 2;
#pragma unroll 2
    for (uint32_t d = part * width / 2; d < end; d += 4) {
      float key[4];
      Kv::key(block, position % kBlockPositions, begin + d, key);
#pragma unroll
      for (uint32_t head = 0; head < kHeads; ++head) {
        const float4 q = load4(space->queries + head * kPiece + d);
        sums[head] += q.x * key[0] + q.y * key[1] + q.z * key[2] + q.w * key[3];
      }
    }
  }
#pragma unroll
  for (uint32_t head = 0; head < kHeads; ++head) space->scores[part][head][position] = sums[head];
  sync_threads();
}

// Of a head, by one warp: scores become exp(score - largest), times the scale of the value.
template <typename Kv>
__device__ inline void weigh(const AttendArgs& args, uint32_t head, uint64_t place,
                             AttendSpace* space) {
  const Seen& seen = space->seen;
  float scores[kChunk / 32], largest = -float_of_bits(kInfinityBits), total = 0;
#pragma unroll
  for (uint32_t i = 0; i < kChunk / 32; ++i) {
    const uint32_t position = 32 * i + lane();
    scores[i] = -float_of_bits(kInfinityBits);
    if (position < seen.first || position > seen.last) continue;
    const uint8_t* block = seen.blocks[position / kBlockPositions];
    scores[i] = (space->scores[0][head][position] + space->scores[1][head][position]) *
                Kv::key_scale(block, args.dim, position % kBlockPositions);
    largest = larger_of(scores[i], largest);
  }
  largest = warp_largest(largest);
#pragma unroll
  for (uint32_t i = 0; i < kChunk / 32; ++i) {
    const uint32_t position = 32 * i + lane();
    float weight = 0;
    if (position >= seen.first && position <= seen.last) {
      const uint8_t* block = seen.blocks[position / kBlockPositions];
      weight = exponential(scores[i] - largest);
      total += weight;
      weight *= Kv::value_scale(block, args.dim, position % kBlockPositions);
    }
    space->scores[0][head][position] = weight;
  }
  total = warp_sum(total);
  if (lane() != 0) return;
  args.chunk_largest[place] = largest;
  args.chunk_total[place] = total;
}

// sums += weights times the values of one dimension, of one block.
template <typename Kv, uint32_t kHeads>
__device__ inline void add_values(const AttendSpace& space, uint32_t block, uint32_t dim,
                                  uint32_t d, float (&sums)[kHeads]) {
#pragma unroll
  for (uint32_t tuple = 0; tuple < kBlockPositions / Kv::kPositions; ++tuple) {
    float values[Kv::kPositions];
    Kv::value(space.seen.blocks[block], dim, tuple, d, values);
#pragma unroll
    for (uint32_t i = 0; i < Kv::kPositions; ++i) {
      const uint32_t position = block * kBlockPositions + tuple * Kv::kPositions + i;
      const bool sees = position >= space.seen.first && position <= space.seen.last;
      const float value = sees ? values[i] : 0.0f;
#pragma unroll
      for (uint32_t head = 0; head < kHeads; ++head) {
        sums[head] += space.scores[0][head][position] * value;
      }
    }
  }
}

// A thread has one dimension; where there are fewer than threads, blocks of positions are shared
// out among parts of the threads, whose sums are added in order.
template <typename Kv, uint32_t kHeads>
__device__ inline void mix(const AttendArgs& args, uint64_t place, uint32_t heads,
                           AttendSpace* space) {
  constexpr uint32_t kBlocks = kChunk / kBlockPositions;
  const uint32_t fitting = kThreads / args.dim;
  const uint32_t parts = fitting < 1 ? 1 : fitting < kBlocks ? fitting : kBlocks;
  const uint32_t width = args.dim < kPiece ? args.dim : kPiece, part = threadIdx.x / width;
  const uint32_t first = space->seen.first / kBlockPositions;
  const uint32_t last = space->seen.last / kBlockPositions;
  for (uint32_t begin = 0; begin < args.dim; begin += kPiece) {
    const uint32_t d = begin + threadIdx.x % width;
    const bool works = part < parts && d < args.dim;
    float sums[kHeads] = {};
    for (uint32_t block = part; works && block <= last; block += parts) {
      if (block >= first) add_values<Kv, kHeads>(*space, block, args.dim, d, sums);
    }
    sync_threads();
#pragma unroll
    for (uint32_t head = 0; head < kHeads; ++head) {
      if (works) space->queries[(part * kHeads + head) * width + threadIdx.x % width] = sums[head];
    }
    sync_threads();
    for (uint32_t i = threadIdx.x; i < heads * width; i += kThreads) {
      const uint32_t head = i / width, column = begin + i % width;
      if (column >= args.dim) continue;
      float sum = 0;
      for (uint32_t p = 0; p < parts; ++p) sum += space->queries[p * kHeads * width + i];
      args.chunk_values[(place + uint64_t{head} * args.most_chunks) * args.dim + column] = sum;
    }
  }
}

// Some query heads, from `head` of the row on, whose results are `most_chunks` apart.
template <typename Kv, uint32_t kHeads>
__device__ inline void attend_heads(const AttendArgs& args, uint32_t head, uint32_t heads,
                                    AttendSpace* space) {
  const uint64_t row_head = uint64_t{blockIdx.z} * args.heads + head;
  const uint64_t place = row_head * args.most_chunks + blockIdx.x;
  score<Kv, kHeads>(args, args.queries + row_head * args.dim, heads, space);
  if (warp() < heads) {
    weigh<Kv>(args, warp(), place + uint64_t{warp()} * args.most_chunks, space);
  }
  sync_threads();
  mix<Kv, kHeads>(args, place, heads, space);
  sync_threads();
}

template <typename Kv>
__device__ inline void attend_group(const AttendArgs& args, AttendSpace* space) {
  const uint32_t group = args.heads / args.kv_heads;
  for (uint32_t done = 0; done < group; done += kMostHeads) {
    const uint32_t head = blockIdx.y * group + done;
    const uint32_t heads = group - done < kMostHeads ? group - done : kMostHeads;
    if (heads == 1) {
      attend_heads<Kv, 1>(args, head, heads, space);
    } else if (heads <= 4) {
      attend_heads<Kv, 4>(args, head, heads, space);
    } else {
      attend_heads<Kv, kMostHeads>(args, head, heads, space);
    }
  }
}

SK_KERNEL(attend, AttendArgs) {
  __shared__ AttendSpace space;
  const uint32_t position = read_shared(&args.tokens[blockIdx.z].position);
  const uint32_t chunk = first_seen(position, args.window) / kChunk + blockIdx.x;
  if (chunk > position / kChunk) return;
  find_blocks(args, chunk, position, &space.seen);
  if (args.kv_bits == 16) {
    attend_group<KvBfloat16>(args, &space);
  } else {
    attend_group<KvBytes>(args, &space);
  }
}

}  // namespace cuda
}  // namespace sk
