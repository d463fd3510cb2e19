// dot_FORMAT_TILES, see DotArgs.
#pragma once

#include "product.cuh"

namespace sk {
namespace cuda {

template <class Format, int kTiles>
__device__ inline void dot(const DotArgs& args) {
  const Tokens tokens = {blockIdx.y * kTokensOfTile * kTiles, args.rows};
  const Rows rows = {blockIdx.x * kRowsOfBlock, kAllRows};
  const Weights* const weights[1] = {&args.weights};
  float results[1][kPieces<kTiles>];
  multiply_rows<Format, kTiles, 1>(weights, rows, args.operand, tokens, results);
  const uint32_t row = rows.first + own_row();
  if (!owns_result<kTiles>() || row >= args.valid) return;
  const float bias = args.bias == nullptr ? 0.0f : read_shared(args.bias + row);
#pragma unroll
  for (int piece = 0; piece < kPieces<kTiles>; ++piece) {
    const uint32_t token = own_token(piece);
    if (!tokens.has(token)) continue;
    float* out = args.out + uint64_t{tokens.first + token} * args.out_stride + row;
    *out = args.add != 0 ? *out + (results[0][piece] + bias) : results[0][piece];
  }
}

SK_KERNEL(dot_bfloat16_1, DotArgs) { dot<Bfloat16, 1>(args); }
SK_KERNEL(dot_bfloat16_4, DotArgs) { dot<Bfloat16, 4>(args); }
SK_KERNEL(dot_bfloat16_8, DotArgs) { dot<Bfloat16, 8>(args); }
SK_KERNEL(dot_int8_1, DotArgs) { dot<Int8, 1>(args); }
SK_KERNEL(dot_int8_4, DotArgs) { dot<Int8, 4>(args); }
SK_KERNEL(dot_int8_8, DotArgs) { dot<Int8, 8>(args); }
SK_KERNEL(dot_int4_1, DotArgs) { dot<Int4, 1>(args); }
SK_KERNEL(dot_int4_4, DotArgs) { dot<Int4, 4>(args); }
SK_KERNEL(dot_int4_8, DotArgs) { dot<Int4, 8>(args); }
SK_KERNEL(dot_planes_1, DotArgs) { dot<Planes, 1>(args); }
SK_KERNEL(dot_planes_4, DotArgs) { dot<Planes, 4>(args); }
SK_KERNEL(dot_planes_8, DotArgs) { dot<Planes, 8>(args); }

}  // namespace cuda
}  // namespace sk
