// Rows of the batch: embeddings, what layers add to the residual, norms, and the inputs of
// products.
#pragma once

#include "block.cuh"
#include "positions.cuh"

namespace sk {
namespace cuda {

// out[row] = <row, v> of rows in bfloat16, 4 rows of a warp at once; whole fours of rows are
// stored. Both have zeros from n on, v up to a multiple of 8, and are aligned to 16 bytes.
__device__ inline void dot_rows(const uint8_t* rows, uint64_t stride, uint32_t count,
                                const float* v, uint32_t n, float* out) {
  for (uint32_t row = 4 * warp(); row < count; row += 4 * kWarps) {
    const uint8_t* at = rows + row * stride;
    float sums[4] = {0, 0, 0, 0};
#pragma unroll 2
    for (uint32_t c = 8 * lane(); c < n; c += 8 * 32) {
      const float4 a = load4(v + c), b = load4(v + c + 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 w = read_shared(reinterpret_cast<const uint4*>(at + i * stride + 2 * c));
        sums[i] += low_bfloat16(w.x) * a.x + high_bfloat16(w.x) * a.y;
        sums[i] += low_bfloat16(w.y) * a.z + high_bfloat16(w.y) * a.w;
        sums[i] += low_bfloat16(w.z) * b.x + high_bfloat16(w.z) * b.y;
        sums[i] += low_bfloat16(w.w) * b.z + high_bfloat16(w.w) * b.w;
      }
    }
    for (int i = 0; i < 4; ++i) {
      const float sum = warp_sum(sums[i]);
      if (lane() == 0) out[row + i] = sum;
    }
  }
}

// x[c] += z[0] row 0 [c] + z[1] row 1 [c] + ..., of rows in bfloat16.
__device__ inline void add_rows(const uint8_t* rows, uint64_t stride, uint32_t count,
                                const float* z, uint32_t n, float* x) {
  for (uint32_t c = 8 * threadIdx.x; c < n; c += 8 * kThreads) {
    float sums[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 4
    for (uint32_t row = 0; row < count; ++row) {
      const uint4 w = read_shared(reinterpret_cast<const uint4*>(rows + row * stride + 2 * c));
      const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[2 * i] += z[row] * low_bfloat16(pairs[i]);
        sums[2 * i + 1] += z[row] * high_bfloat16(pairs[i]);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      if (c + i < n) x[c + i] += sums[i];
    }
  }
}

// The place in a row of products of the j-th factor of a low-rank term; with `halves` the first of
// its two, the other is kRankTile further.
constexpr uint32_t kRankTile = 32;
constexpr float kUpperHalf = 16;
__device__ inline uint32_t factor_place(uint32_t j, uint32_t halves) {
  return halves != 0 ? j / kRankTile * 2 * kRankTile + j % kRankTile : j;
}

// Null: the row wants none.
__device__ inline const Correction* correction_of(const CorrectionArgs& args, uint32_t row) {
  const uint32_t number = args.choices[args.tokens[row].sequence].correction;
  if (number == 0) return nullptr;
  const Correction* own = args.of_number + (number - 1);
  return own->rank == 0 ? nullptr : own;
}

__device__ inline void add_parts(const PrepareArgs& args, uint32_t row, float* x) {
  __shared__ float z[kMostRank];
  const float* parts = args.parts + uint64_t{row} * args.parts_stride;
  const uint64_t step = uint64_t{args.rows} * args.parts_stride;
  const auto sum = [&](uint32_t column) {
    float total = 0;
#pragma unroll 4
    for (uint32_t p = 0; p < args.num_parts; ++p) total += read_shared(parts + p * step + column);
    return total;
  };
  for (uint32_t c = threadIdx.x; c < args.size; c += kThreads) {
    const float added = sum(c);
    x[c] += args.down_bias == nullptr ? added : added + read_shared(args.down_bias + c);
  }
  const Correction* correction =
      args.corrections == nullptr ? nullptr : correction_of(*args.corrections, row);
  if (correction != nullptr) {
    const float* outputs = args.corrections->z + uint64_t{row} * kMostCorrectionRank;
    for (uint32_t j = threadIdx.x; j < correction->rank; j += kThreads) z[j] = outputs[j];
    sync_threads();
    add_rows(correction->outputs, correction->outputs_stride, correction->rank, z, args.size, x);
    sync_threads();
  }
  if (args.down_rank != 0) {
    for (uint32_t j = threadIdx.x; j < args.down_rank; j += kThreads) {
      const uint32_t place = args.down_factors + factor_place(j, args.down_halves);
      z[j] = args.down_halves != 0 ? kUpperHalf * sum(place) + sum(place + kRankTile) : sum(place);
    }
    sync_threads();
    add_rows(args.down_basis, args.down_basis_stride, args.down_rank, z, args.size, x);
  }
  sync_threads();
}

// A head's chunks of attention, merged in order: running softmax (arXiv 1805.02867). By one warp.
__device__ inline void merge_head(const PrepareArgs& args, uint32_t row, uint32_t head, float* v) {
  const uint32_t position = read_shared(&args.tokens[row].position);
  const uint32_t chunks = chunks_of(position, args.window);
  const uint64_t at = (uint64_t{row} * args.heads + head) * args.most_chunks;
  for (uint32_t d = 4 * lane(); d < args.head_dim; d += 4 * 32) {
    float largest = read_shared(args.chunk_largest + at), total = 0;
    float values[4] = {0, 0, 0, 0};
#pragma unroll 4
    for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
      const float own = read_shared(args.chunk_largest + at + chunk);
      const bool larger = own > largest;
      const float factor = exponential(larger ? largest - own : own - largest);
      const float keep = larger ? factor : 1, take = larger ? 1 : factor;
      const float4 more = read_shared(
          reinterpret_cast<const float4*>(args.chunk_values + (at + chunk) * args.dim + d));
      if (larger) largest = own;
      total = total * keep + read_shared(args.chunk_total + at + chunk) * take;
      values[0] = values[0] * keep + more.x * take;
      values[1] = values[1] * keep + more.y * take;
      values[2] = values[2] * keep + more.z * take;
      values[3] = values[3] * keep + more.w * take;
    }
    const float factor = 1.0f / total;
    for (uint32_t i = 0; i < 4; ++i) {
      if (d + i < args.head_dim) v[head * args.head_dim + d + i] = values[i] * factor;
    }
  }
}

// v = x, normed if there is a norm; x and v may be the same.
__device__ inline void norm_row(const PrepareArgs& args, const float* x, float* v) {
  float factor = 1;
  if (args.norm != nullptr) {
    const float mean = sum_of_squares(x, args.size) / static_cast<float>(args.size);
    factor = 1.0f / square_root(mean + args.eps);
  }
  for (uint32_t c = threadIdx.x; c < args.size; c += kThreads) {
    v[c] = args.norm == nullptr ? x[c] : x[c] * factor * read_shared(args.norm + c);
  }
  for (uint32_t c = args.size + threadIdx.x; c < args.columns; c += kThreads) v[c] = 0;
  sync_threads();
}

// The inputs of a low-rank term's factors, see sk_matrix.
__device__ inline void put_factor_inputs(const PrepareArgs& args, float* v) {
  __shared__ float u[kMostRank];
  dot_rows(args.basis, args.basis_stride, args.rank, v, args.size, u);
  sync_threads();
  for (uint32_t j = threadIdx.x; j < args.rank; j += kThreads) {
    float* to = v + args.factors + factor_place(j, args.halves);
    to[0] = args.halves != 0 ? kUpperHalf * u[j] : u[j];
    if (args.halves != 0) to[kRankTile] = u[j];
  }
  sync_threads();
}

__device__ inline void store_bfloat16(const PrepareArgs& args, uint32_t row, const float* v) {
  uint8_t* high = args.operand.halves + 2 * uint64_t{row} * args.operand.stride;
  uint8_t* low = high + args.operand.stride;
  for (uint32_t c = 2 * threadIdx.x; c < args.columns; c += 2 * kThreads) {
    uint32_t halves[2] = {0, 0};
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t upper = bfloat16_of(v[c + i]);
      halves[0] |= upper << 16 * i;
      halves[1] |= bfloat16_of(v[c + i] - low_bfloat16(upper)) << 16 * i;
    }
    *reinterpret_cast<uint32_t*>(high + 2 * c) = halves[0];
    *reinterpret_cast<uint32_t*>(low + 2 * c) = halves[1];
  }
}

// Four columns of a lane; a group is some lanes side by side.
__device__ inline void store_integers(const PrepareArgs& args, uint32_t row, const float* v) {
  const bool wide = args.activation_bits == 16;
  const int lanes = static_cast<int>(args.group / 4);
  uint8_t* upper = args.operand.halves + 2 * uint64_t{row} * args.operand.stride;
  uint8_t* lower = upper + args.operand.stride;
  for (uint32_t begin = 128 * warp(); begin < args.columns; begin += 128 * kWarps) {
    const uint32_t c = begin + 4 * lane();
    float x[4] = {0, 0, 0, 0};
    for (uint32_t i = 0; i < 4; ++i) x[i] = c < args.columns ? v[c + i] : 0.0f;
    float top = 0, squares = 0;
    for (int i = 0; i < 4; ++i) {
      top = larger_of(top, magnitude_of(x[i]));
      squares += x[i] * x[i];
    }
    for (int mask = 1; mask < lanes; mask *= 2) {
      top = larger_of(top, shuffle_xor(top, mask));
      squares += shuffle_xor(squares, mask);
    }
    const Scale scale = scale_for(top, args.activation_bits);
    int32_t sum = 0;
    uint32_t uppers = 0, lowers = 0;
    for (int i = 0; i < 4; ++i) {
      const int32_t n = scale.to == 0 ? 0 : round_to_int(x[i] * scale.to);
      const int32_t high = wide ? (n + 128) >> 8 : 0;
      sum += n;
      uppers |= (static_cast<uint32_t>(high) & 255u) << 8 * i;
      lowers |= (static_cast<uint32_t>(n - 256 * high) & 255u) << 8 * i;
    }
    for (int mask = 1; mask < lanes; mask *= 2) sum += shuffle_xor(sum, mask);
    if (c >= args.columns) continue;
    *reinterpret_cast<uint32_t*>(upper + c) = uppers;
    *reinterpret_cast<uint32_t*>(lower + c) = lowers;
    if (c % args.group != 0) continue;
    const uint64_t place = uint64_t{row} * args.operand.groups + c / args.group;
    args.operand.scales[place] = scale.from;
    args.operand.offsets[place] = scale.from * static_cast<float>(sum);
    if (args.squares != nullptr) {
      args.squares[uint64_t{row} * args.groups + c / args.group] = squares;
    }
  }
}

SK_KERNEL(embed, EmbedArgs) {
  const uint32_t row = blockIdx.x;
  const uint32_t id = static_cast<uint32_t>(read_shared(&args.tokens[row].id));
  const uint32_t position = read_shared(&args.tokens[row].position);
  const uint16_t* from =
      reinterpret_cast<const uint16_t*>(args.embedding + id * args.embedding_stride);
  float* x = args.x + uint64_t{row} * args.hidden;
  for (uint32_t c = threadIdx.x; c < args.hidden; c += kThreads) {
    x[c] = low_bfloat16(read_shared(from + c));
  }
  const uint32_t last = args.rope_rows - 1;
  const float* frequencies =
      args.frequencies + uint64_t{position < last ? position : last} * args.half;
  for (uint32_t i = threadIdx.x; i < args.half; i += kThreads) {
    const float angle = static_cast<float>(position) * read_shared(frequencies + i);
    args.cos[uint64_t{row} * args.half + i] = cosine(angle) * args.rope_scale;
    args.sin[uint64_t{row} * args.half + i] = sine(angle) * args.rope_scale;
  }
}

SK_KERNEL(prepare, PrepareArgs) {
  const uint32_t row = blockIdx.x;
  float* v = args.normed + uint64_t{row} * args.normed_stride;
  float* x = v;
  if (args.source == kFromAttention) {
    for (uint32_t head = warp(); head < args.heads; head += kWarps) merge_head(args, row, head, v);
    sync_threads();
  } else {
    x = args.x +
        uint64_t{args.row_list == nullptr ? row : read_shared(args.row_list + row)} * args.x_stride;
    if (args.source == kFromParts) add_parts(args, row, x);
  }
  norm_row(args, x, v);
  if (args.columns == 0) return;
  if (args.rank != 0) put_factor_inputs(args, v);
  if (args.group == 0) {
    store_bfloat16(args, row, v);
  } else {
    store_integers(args, row, v);
  }
}

SK_KERNEL(correct, CorrectionArgs) {
  const uint32_t row = blockIdx.x;
  const Correction* correction = correction_of(args, row);
  if (correction == nullptr) return;
  dot_rows(correction->inputs, correction->inputs_stride, correction->rank,
           args.normed + uint64_t{row} * args.normed_stride, args.hidden,
           args.z + uint64_t{row} * kMostCorrectionRank);
}

SK_KERNEL(copy_rows, CopyArgs) {
  const uint32_t row = blockIdx.x;
  const float* from = args.from + uint64_t{read_shared(args.row_list + row)} * args.size;
  float* to = args.to + uint64_t{row} * args.size;
  for (uint32_t c = threadIdx.x; c < args.size; c += kThreads) to[c] = read_shared(from + c);
}

}  // namespace cuda
}  // namespace sk
