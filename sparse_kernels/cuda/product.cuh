// Products of 16 rows of weights, of one or two matrices, with tokens, on the tensor cores at every
// number of tokens: what a token gets depends neither on who is computed beside it nor on how many.
//
// A block's warps share the columns: warp w takes spans w, w + kWarps, … in order, and what warps
// have is added up in their order. In a warp, with g = lane / 4 and t = lane % 4, a lane reads the
// weights of rows g and g + 8 and gets the results of these rows for token t of each tile of four.
// The columns of a product are the two halves of a token's input, see Operand: upper or high 2 t,
// lower or low 2 t + 1. Which of a span's columns stand side by side in an instruction does not
// matter as long as weights and inputs agree: lane t has 8 t … 8 t + 7 of each 32.
#pragma once

#include "codes.cuh"

namespace sk {
namespace cuda {

constexpr uint32_t kRowsOfBlock = 16;  // of weights
constexpr uint32_t kAllRows = 0xffff;

// 16 rows from `first` on; those whose bit of `needed` is 0 are not read, and get anything finite.
struct Rows {
  uint32_t first, needed;
  __device__ bool needs(uint32_t row) const { return (needed >> row & 1) != 0; }
};

// The tokens of a block: up to four for each tile.
struct Tokens {
  uint32_t first, rows;
  __device__ bool has(uint32_t token) const { return first + token < rows; }
};

__device__ inline uint32_t warp_index() { return threadIdx.x / 32; }
__device__ inline uint32_t lane_index() { return threadIdx.x % 32; }

// What a lane has of a span of a matrix's rows, and how tiles of tokens are multiplied with it.
template <class Format>
struct Span {
  static constexpr uint32_t kColumns = 128;
  static constexpr int kSums = 2;  // of a tile: rows g and g + 8
  static constexpr int kHalves = 4;

  typename Format::template Tile<2> tiles[2][2];  // [of the span][row g, g + 8]
  // [row][half tile]: with the last half tile of a group its scale, and its zero in the upper half;
  // with others 0.
  uint32_t scales[2][kHalves];

  // Of a group that ends with half tile `half` of span `span` its number, else `groups`.
  __device__ static uint32_t group_ending(uint32_t group, uint32_t groups, uint32_t span,
                                          int half) {
    const uint32_t last = span * kColumns + 32 * half + 31, number = last / group;
    return last % group == group - 1 && number < groups ? number : groups;
  }

  __device__ void read(const Weights& w, const Rows& rows, uint32_t span) {
    const uint32_t g = lane_index() / 4, t = lane_index() % 4;
    for (int r = 0; r < 2; ++r) {
      const uint32_t row = rows.first + g + 8 * r;
      const bool needed = rows.needs(g + 8 * r);
      for (int i = 0; i < 2; ++i) {
        tiles[i][r] = {};
        const uint32_t tile = 2 * span + i;
        if (needed && 64 * tile < w.columns) Format::read(w, row, tile, 2 * t, true, tiles[i][r]);
      }
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t group = group_ending(w.group, w.groups, span, half);
        scales[r][half] = 0;
        if (!needed || group == w.groups) continue;
        const uint64_t at = uint64_t{row} * w.groups + group;
        scales[r][half] = read_shared(w.scales + at) | uint32_t{read_shared(w.zeros + at)} << 16;
      }
    }
  }

  template <int kTiles>
  __device__ void multiply(const Weights& w, const Operand& operand, const Tokens& tokens,
                           uint32_t span, float (&sums)[kTiles][kSums]) const {
    const uint32_t g = lane_index() / 4, t = lane_index() % 4;
    uint32_t a[kHalves][4];
#pragma unroll
    for (int i = 0; i < 4 * kHalves; ++i) {
      const int half = i / 4, r = i % 2, quad = i % 4 / 2;
      a[half][i % 4] = Format::codes(w, tiles[half / 2][r], half % 2, 2 * t, quad, true);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (!tokens.has(kTokensOfTile * tile)) continue;
      uint32_t b[kHalves][2];
      float scale[kHalves], offset[kHalves];
      const uint8_t* row = operand.halves + (2 * tokens.first + 8 * tile + g) * operand.stride;
      const uint64_t groups_at = uint64_t{tokens.first + 4 * tile + t} * operand.groups;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint32_t column = span * kColumns + 32 * half;
        uint2 v = {0, 0};
        if (tokens.has(4 * tile + g / 2) && column < w.columns) {
          v = read_shared(reinterpret_cast<const uint2*>(row + column + 8 * t));
        }
        b[half][0] = v.x;
        b[half][1] = v.y;
        const uint32_t group = group_ending(w.group, w.groups, span, half);
        const bool there = group != w.groups && tokens.has(4 * tile + t);
        scale[half] = there ? read_shared(operand.scales + groups_at + group) : 0.0f;
        offset[half] = there ? read_shared(operand.offsets + groups_at + group) : 0.0f;
      }
      int32_t c[4] = {};
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        mma_bytes(c, a[half], b[half]);
        if ((32 * half + 32) % w.group != 0) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          add_group(w, scales[r][half], 256 * c[2 * r] + c[2 * r + 1], scale[half], offset[half],
                    &sums[tile][r]);
          c[2 * r] = c[2 * r + 1] = 0;
        }
      }
    }
  }

  __device__ static void add_group(const Weights& w, uint32_t packed, int32_t sum, float scale,
                                   float offset, float* to) {
    const float zero = Format::middle(w) - static_cast<float>(packed >> 16);
    const float product =
        multiply_add(scale * Format::unit(w), static_cast<float>(sum), zero * offset);
    *to = multiply_add(float_of_half(static_cast<uint16_t>(packed)), product, *to);
  }

  __device__ static float sum_of(const float (&sums)[kSums], int r) { return sums[r]; }
};

template <>
struct Span<Bfloat16> {
  static constexpr uint32_t kColumns = 64;
  static constexpr int kSums = 4;  // of a tile: high and low of row g, then of row g + 8

  uint4 words[2][2];  // [of 32 columns][row]

  __device__ void read(const Weights& w, const Rows& rows, uint32_t span) {
    const uint32_t g = lane_index() / 4, t = lane_index() % 4;
    for (int r = 0; r < 2; ++r) {
      const uint8_t* row = w.codes + (rows.first + g + 8 * r) * w.stride + 128 * span + 16 * t;
      const bool needed = rows.needs(g + 8 * r);
      for (int i = 0; i < 2; ++i) {
        words[i][r] = {0, 0, 0, 0};
        if (needed) words[i][r] = read_once(reinterpret_cast<const uint4*>(row + 64 * i));
      }
    }
  }

  template <int kTiles>
  __device__ void multiply(const Weights&, const Operand& operand, const Tokens& tokens,
                           uint32_t span, float (&sums)[kTiles][kSums]) const {
    const uint32_t g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (!tokens.has(kTokensOfTile * tile)) continue;
      const uint8_t* row =
          operand.halves + (2 * tokens.first + 8 * tile + g) * operand.stride + 128 * span + 16 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint4 v = {0, 0, 0, 0};
        if (tokens.has(4 * tile + g / 2)) {
          v = read_shared(reinterpret_cast<const uint4*>(row + 64 * i));
        }
        const uint4 &low = words[i][0], &high = words[i][1];
        const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
        const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
        mma_bfloat16(sums[tile], a[0], b[0]);
        mma_bfloat16(sums[tile], a[1], b[1]);
      }
    }
  }

  __device__ static float sum_of(const float (&sums)[kSums], int r) {
    return sums[2 * r] + sums[2 * r + 1];
  }
};

// Adds this warp's columns of rows of `w`, matrices of one shape, to `sums`. A span of one matrix
// comes after the same span of the other, whose inputs are still near. Weights are read one ahead
// of what is multiplied, where there are registers for it.
template <class Format, int kTiles, int kMatrices>
__device__ inline void multiply(const Weights* const (&w)[kMatrices], const Rows& rows,
                                const Operand& operand, const Tokens& tokens,
                                float (&sums)[kMatrices][kTiles][Span<Format>::kSums]) {
  constexpr bool kAhead = kTiles < 8 && sizeof(Span<Format>) <= 96;
  const uint32_t columns = Span<Format>::kColumns;
  const uint32_t count = (w[0]->columns + columns - 1) / columns;
  Span<Format> now, next;
  if (kAhead && warp_index() < count) next.read(*w[0], rows, warp_index());
#pragma unroll 1
  for (uint32_t span = warp_index(); span < count; span += kWarps) {
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      if constexpr (kAhead) {
        now = next;
        const uint32_t later = m + 1 < kMatrices ? span : span + kWarps;
        if (later < count) next.read(*w[(m + 1) % kMatrices], rows, later);
      } else {
        now.read(*w[m], rows, span);
      }
      now.multiply(*w[m], operand, tokens, span, sums[m]);
    }
  }
}

// A thread has a result of each piece of 16 tokens, or of the only four: of row threadIdx.x % 16
// and token threadIdx.x / 16 of the piece.
constexpr int kTilesOfPiece = 4;
template <int kTiles>
constexpr int kPieces = (kTiles + kTilesOfPiece - 1) / kTilesOfPiece;

__device__ inline uint32_t own_row() { return threadIdx.x % kRowsOfBlock; }
__device__ inline uint32_t own_token(int piece) {
  return 4 * kTilesOfPiece * piece + threadIdx.x / kRowsOfBlock;
}
// Whether this thread has a result of a piece at all.
template <int kTiles>
__device__ inline bool owns_result() {
  return kTiles >= kTilesOfPiece || threadIdx.x < kRowsOfBlock * kTokensOfTile * kTiles;
}

__device__ inline float (*warp_sums()) [kThreads] {
  __shared__ float sums[kWarps][kThreads];
  return sums;
}

// Adds up what the warps have -> this thread's results. All threads of the block come here.
template <class Format, int kTiles>
__device__ inline void add_warps(const float (&sums)[kTiles][Span<Format>::kSums],
                                 float (&results)[kPieces<kTiles>]) {
  float (*const of_warps)[kThreads] = warp_sums();
  constexpr int kTilesAtOnce = kTiles < kTilesOfPiece ? kTiles : kTilesOfPiece;
  const uint32_t g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int piece = 0; piece < kPieces<kTiles>; ++piece) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesAtOnce; ++i) {
      const int tile = i / 2, r = i % 2;
      of_warps[warp_index()][kRowsOfBlock * (kTokensOfTile * tile + t) + g + 8 * r] =
          Span<Format>::sum_of(sums[kTilesOfPiece * piece + tile], r);
    }
    sync_threads();
    float sum = 0.0f;
    if (owns_result<kTiles>()) {
      for (uint32_t warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][threadIdx.x];
    }
    results[piece] = sum;
    sync_threads();
  }
}

// The products of rows of matrices of one shape with all tokens of a block -> this thread's
// results. All threads come here.
template <class Format, int kTiles, int kMatrices>
__device__ inline void multiply_rows(const Weights* const (&w)[kMatrices], const Rows& rows,
                                     const Operand& operand, const Tokens& tokens,
                                     float (&results)[kMatrices][kPieces<kTiles>]) {
  float sums[kMatrices][kTiles][Span<Format>::kSums] = {};
  multiply<Format, kTiles, kMatrices>(w, rows, operand, tokens, sums);
#pragma unroll
  for (int m = 0; m < kMatrices; ++m) add_warps<Format, kTiles>(sums[m], results[m]);
}

}  // namespace cuda
}  // namespace sk
