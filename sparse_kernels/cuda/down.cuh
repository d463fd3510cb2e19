// down_FORMAT_TILES, see DownArgs: sums over neurons, of 64 columns.
//
// A block's warps share the neuron blocks of a slice: warp w takes the w-th, the (w + kWarps)-th, …
// in order, and what warps have is added up in their order. In an instruction columns of weights
// stand where product.cuh has rows, and neurons where it has columns; lane (g, t) gets the results
// of token t of each tile.
#pragma once

#include "down_inputs.cuh"

namespace sk {
namespace cuda {

constexpr int kDownSums = 8;  // columns of a lane

template <class Format>
struct DownOf {
  // Sums are of columns 4 g … 4 g + 3 of the first half, then of the second.
  __device__ static uint32_t column_of(int i) {
    return 32 * (i / 4) + 4 * (lane_index() / 4) + i % 4;
  }

  template <int kTiles>
  __device__ static void add_part(const DownArgs& args, const Tokens& tokens, const Part& part,
                                  float (&sums)[kTiles][kDownSums]) {
    const Places places = places_of(part.mask);
    if (places.steps == 0) return;
    PartCodes codes;
    read_codes<Format>(args.weights, part, places, &codes);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (!tokens.has(kTokensOfTile * tile)) continue;
      add_tile(args, part, places, codes, tokens.first + kTokensOfTile * tile, sums[tile]);
    }
  }

  __device__ static void add_tile(const DownArgs& args, const Part& part, const Places& places,
                                  const PartCodes& codes, uint32_t first,
                                  float (&sums)[kDownSums]) {
    Activations activations;
    activations.read(args, part, places, first);
    uint32_t b[2][2];
    int32_t offset = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 0 || args.weights.group == 32) {
        const uint32_t group = (kNeuronBlock * blockIdx.x + 32 * half) / args.weights.group;
        offset = activations.quantize(args.weights, part, places, group, b);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int32_t c[4] = {};
        mma_bytes(c, codes.a[0][half][j], b[0]);
        if (places.steps == 2) mma_bytes(c, codes.a[1][half][j], b[1]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float& sum = sums[4 * half + 2 * j + r];
          const int32_t exact = 256 * c[2 * r] + c[2 * r + 1] - offset;
          sum = multiply_add(activations.from, static_cast<float>(exact), sum);
        }
      }
    }
  }

  // The part of a block that is read whole, or the one that is read coarsely.
  __device__ static Part part_of(const DownArgs& args, uint32_t block, bool whole) {
    if (args.masks == nullptr) return {block, {~0u, ~0u}, true, false};
    const bool split = args.weights.low != nullptr;
    if (whole) {
      return {block, mask_of(args, split ? kDownWhole : kUsed, args.rows, block), true, split};
    }
    uint2 coarse = {0, 0};
    for (uint32_t row = lane_index(); row < args.rows; row += 32) {
      const uint2 own = coarse_mask(args, row, block);
      coarse = {coarse.x | own.x, coarse.y | own.y};
    }
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      coarse.x |= shuffle_xor(coarse.x, lanes);
      coarse.y |= shuffle_xor(coarse.y, lanes);
    }
    return {block, coarse, false, true};
  }

  template <int kTiles>
  __device__ static void add_block(const DownArgs& args, const Tokens& tokens, uint32_t block,
                                   float (&sums)[kTiles][kDownSums]) {
    const int parts = args.masks != nullptr && args.weights.low != nullptr ? 2 : 1;
#pragma unroll 1
    for (int i = 0; i < parts; ++i) {
      add_part(args, tokens, part_of(args, block, i == 0), sums);
    }
  }
};

// Sums of floats depend on what stands where: a neuron's place is its own, and what is added for
// neurons that a token does not use is zero.
template <>
struct DownOf<Bfloat16> {
  static constexpr uint32_t kSlot = 16;  // neurons of an instruction

  // Columns 8 g … 8 g + 7.
  __device__ static uint32_t column_of(int i) { return 8 * (lane_index() / 4) + i; }

  // Of lane (g, t) neurons 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of a slot.
  __device__ static uint32_t place(int i) { return 2 * (lane_index() % 4) + i % 2 + i / 2 * 8; }

  __device__ static void read_slot(const DownArgs& args, uint32_t first, uint32_t used,
                                   uint4 (&rows)[4]) {
    const uint8_t* at = args.weights.codes + 128 * blockIdx.x + 16 * (lane_index() / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = {0, 0, 0, 0};
      if ((used >> place(i) & 1) == 0) continue;
      rows[i] =
          read_once(reinterpret_cast<const uint4*>(at + (first + place(i)) * args.weights.stride));
    }
  }

  template <int kTiles>
  __device__ static void add_slot(const DownArgs& args, const Tokens& tokens, uint32_t first,
                                  const uint4 (&rows)[4], float (&sums)[kTiles][kDownSums]) {
    uint32_t a[4][4];  // [instruction]: columns 2 j and 2 j + 1 are its rows g and g + 8
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 &one = rows[2 * r], &two = rows[2 * r + 1];
      const uint32_t pairs[4][2] = {{one.x, two.x}, {one.y, two.y}, {one.z, two.z}, {one.w, two.w}};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        a[j][2 * r] = byte_perm(pairs[j][0], pairs[j][1], 0x5410);
        a[j][2 * r + 1] = byte_perm(pairs[j][0], pairs[j][1], 0x7632);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (!tokens.has(kTokensOfTile * tile)) continue;
      uint32_t b[2];
      take_halves(args, tokens.first + kTokensOfTile * tile + lane_index() / 8, first, b);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float c[4] = {};
        mma_bfloat16(c, a[j], b);
        sums[tile][2 * j] += c[0] + c[1];
        sums[tile][2 * j + 1] += c[2] + c[3];
      }
    }
  }

  // The high or the low half of a token's activations.
  __device__ static void take_halves(const DownArgs& args, uint32_t row, uint32_t first,
                                     uint32_t (&b)[2]) {
    const bool low = lane_index() / 4 % 2 == 1;
    const float* at = args.activations + uint64_t{row} * args.stride + first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2 v = {0, 0};
      if (row < args.rows) v = read_shared(reinterpret_cast<const float2*>(at + place(2 * r)));
      b[r] = half_of(v.x, low) | uint32_t{half_of(v.y, low)} << 16;
    }
  }
  __device__ static uint16_t half_of(float v, bool low) {
    const uint32_t high = bfloat16_of(v);
    return static_cast<uint16_t>(low ? bfloat16_of(v - float_of_bits(high << 16)) : high);
  }

  template <int kTiles>
  __device__ static void add_block(const DownArgs& args, const Tokens& tokens, uint32_t block,
                                   float (&sums)[kTiles][kDownSums]) {
    uint2 mask = {~0u, ~0u};
    if (args.masks != nullptr) mask = mask_of(args, kUsed, args.rows, block);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two slots at once
      const uint32_t used = half == 0 ? mask.x : mask.y;
      const uint32_t first = kNeuronBlock * block + 2 * kSlot * half;
      uint4 rows[2][4];
      read_slot(args, first, used & 0xffff, rows[0]);
      read_slot(args, first + kSlot, used >> 16, rows[1]);
      if ((used & 0xffff) != 0) add_slot(args, tokens, first, rows[0], sums);
      if (used >> 16 != 0) add_slot(args, tokens, first + kSlot, rows[1], sums);
    }
  }
};

template <class Format, int kTiles>
__device__ inline void down(const DownArgs& args) {
  using Own = DownOf<Format>;
  const Tokens tokens = {blockIdx.z * kTokensOfTile * kTiles, args.rows};
  const uint32_t slice = blockIdx.y;
  const uint32_t begin = static_cast<uint32_t>(uint64_t{args.blocks} * slice / args.slices);
  const uint32_t end = static_cast<uint32_t>(uint64_t{args.blocks} * (slice + 1) / args.slices);
  float sums[kTiles][kDownSums] = {};
#pragma unroll 1
  for (uint32_t block = begin + warp_index(); block < end; block += kWarps) {
    Own::add_block(args, tokens, block, sums);
  }
  float (*const of_warps)[kThreads] = warp_sums();
  const uint32_t token = threadIdx.x / 64, column = threadIdx.x % 64;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    if (!tokens.has(kTokensOfTile * tile)) continue;
#pragma unroll
    for (int i = 0; i < kDownSums; ++i) {
      of_warps[warp_index()][64 * (lane_index() % 4) + Own::column_of(i)] = sums[tile][i];
    }
    sync_threads();
    float sum = 0.0f;
    for (uint32_t warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][threadIdx.x];
    sync_threads();
    const uint32_t row = tokens.first + kTokensOfTile * tile + token;
    if (row >= args.rows) continue;
    args.parts[(uint64_t{slice} * args.rows + row) * args.parts_stride + 64 * blockIdx.x + column] =
        sum;
  }
}

SK_KERNEL(down_bfloat16_1, DownArgs) { down<Bfloat16, 1>(args); }
SK_KERNEL(down_bfloat16_4, DownArgs) { down<Bfloat16, 4>(args); }
SK_KERNEL(down_bfloat16_8, DownArgs) { down<Bfloat16, 8>(args); }
SK_KERNEL(down_int8_1, DownArgs) { down<Int8, 1>(args); }
SK_KERNEL(down_int8_4, DownArgs) { down<Int8, 4>(args); }
SK_LARGE_KERNEL(down_int8_8, DownArgs) { down<Int8, 8>(args); }
SK_KERNEL(down_int4_1, DownArgs) { down<Int4, 1>(args); }
SK_KERNEL(down_int4_4, DownArgs) { down<Int4, 4>(args); }
SK_LARGE_KERNEL(down_int4_8, DownArgs) { down<Int4, 8>(args); }
SK_KERNEL(down_planes_1, DownArgs) { down<Planes, 1>(args); }
SK_LARGE_KERNEL(down_planes_4, DownArgs) { down<Planes, 4>(args); }
SK_LARGE_KERNEL(down_planes_8, DownArgs) { down<Planes, 8>(args); }

}  // namespace cuda
}  // namespace sk
