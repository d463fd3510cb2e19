// Keys and values in bfloat16, widened to float32 for the arithmetic.

namespace {
namespace bfloat16 {

// Keys of a block: [dim / 2][16 positions][2 dimensions].
void append_key(const float* key, size_t dim, size_t offset, uint8_t* block) {
  for (size_t i = 0; i < dim; i += 2) {
    uint16_t* pair = reinterpret_cast<uint16_t*>(block) + (i / 2 * 16 + offset) * 2;
    pair[0] = bf16_of(key[i]);
    pair[1] = bf16_of(key[i + 1]);
  }
}

// Values of a block, after its keys: [8 pairs of positions][dim][2 positions].
void append_value(const float* value, size_t dim, size_t offset, uint8_t* block) {
  uint16_t* pairs =
      reinterpret_cast<uint16_t*>(block) + 16 * dim + offset / 2 * dim * 2 + offset % 2;
  for (size_t i = 0; i < dim; ++i) pairs[2 * i] = bf16_of(value[i]);
}

// Scores of kRows queries with the 16 positions of each of kBlocks blocks of keys: several sums at
// once hide the latency of each.
template <size_t kRows, size_t kBlocks>
void score_blocks(const float* queries, size_t dim, const uint16_t* const* keys, float* scores) {
  for (size_t lane = 0; lane < 16; lane += kLanes) {
    F sums[kRows][kBlocks];
    for (size_t row = 0; row < kRows; ++row) {
      for (size_t block = 0; block < kBlocks; ++block) sums[row][block] = Simd::zero();
    }
    for (size_t i = 0; i < dim; i += 2) {
      F even[kBlocks], odd[kBlocks];
      for (size_t block = 0; block < kBlocks; ++block) {
        Simd::load_bf16(keys[block] + (i / 2 * 16 + lane) * 2, &even[block], &odd[block]);
      }
      for (size_t row = 0; row < kRows; ++row) {
        const F first = Simd::set(queries[row * dim + i]),
                second = Simd::set(queries[row * dim + i + 1]);
        for (size_t block = 0; block < kBlocks; ++block) {
          sums[row][block] = Simd::fma(first, even[block], sums[row][block]);
          sums[row][block] = Simd::fma(second, odd[block], sums[row][block]);
        }
      }
    }
    for (size_t row = 0; row < kRows; ++row) {
      for (size_t block = 0; block < kBlocks; ++block) {
        Simd::store(scores + row * kAttentionChunk + block * 16 + lane, sums[row][block]);
      }
    }
  }
}

// values[row, d] += sum over the first `positions` of a block of weight * value, in their order.
template <size_t kRows, size_t kVectors>
void add_values(const float* weights, size_t stride, size_t positions, const uint16_t* block,
                size_t dim, float* values) {
  F sums[kRows][kVectors];
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t i = 0; i < kVectors; ++i)
      sums[row][i] = Simd::load(values + row * dim + i * kLanes);
  }
  for (size_t position = 0; position < positions; position += 2) {
    // What stands beyond the last position belongs to nobody: it may be anything, NaN included.
    const bool both = position + 1 < positions;
    for (size_t i = 0; i < kVectors; ++i) {
      F even, odd;
      Simd::load_bf16(block + (position / 2 * dim + i * kLanes) * 2, &even, &odd);
      for (size_t row = 0; row < kRows; ++row) {
        const float* weight = weights + row * stride + position;
        sums[row][i] = Simd::fma(Simd::set(weight[0]), even, sums[row][i]);
        if (both) sums[row][i] = Simd::fma(Simd::set(weight[1]), odd, sums[row][i]);
      }
    }
  }
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t i = 0; i < kVectors; ++i)
      Simd::store(values + row * dim + i * kLanes, sums[row][i]);
  }
}

inline const uint16_t* numbers_of(const AttentionChunk& chunk, size_t index) {
  return reinterpret_cast<const uint16_t*>(block_of(chunk, index));
}

template <size_t kRows>
void score_rows(const AttentionChunk& chunk, size_t row, float* scores) {
  const size_t blocks = blocks_of(chunk);
  const float* queries = chunk.queries + row * chunk.dim;
  float* to = scores + row * kAttentionChunk;
  size_t block = 0;
  for (; block + 2 <= blocks; block += 2) {
    const uint16_t* keys[2] = {numbers_of(chunk, block), numbers_of(chunk, block + 1)};
    if (row == 0) {
      prefetch(chunk, block, 0, 32 * chunk.dim);
      prefetch(chunk, block + 1, 0, 32 * chunk.dim);
    }
    score_blocks<kRows, 2>(queries, chunk.dim, keys, to + block * 16);
  }
  if (block < blocks) {
    const uint16_t* keys[1] = {numbers_of(chunk, block)};
    score_blocks<kRows, 1>(queries, chunk.dim, keys, to + block * 16);
  }
}

template <size_t kRows>
void value_rows(const AttentionChunk& chunk, size_t row, const float* weights) {
  const size_t dim = chunk.dim;
  for (uint32_t begin = chunk.begin; begin < chunk.end; begin += 16) {
    const uint16_t* values = numbers_of(chunk, (begin - chunk.begin) / 16) + 16 * dim;
    if (row == 0) prefetch(chunk, (begin - chunk.begin) / 16, 32 * dim, 32 * dim);
    const size_t positions = chunk.end - begin < 16 ? chunk.end - begin : 16;
    const float* from = weights + row * kAttentionChunk + (begin - chunk.begin);
    size_t i = 0;
    for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
      add_values<kRows, 4>(from, kAttentionChunk, positions, values + 2 * i, dim,
                           chunk.values + row * dim + i);
    }
    for (; i < dim; i += kLanes) {
      add_values<kRows, 1>(from, kAttentionChunk, positions, values + 2 * i, dim,
                           chunk.values + row * dim + i);
    }
  }
}

void attend(const AttentionChunk* chunk) {
  alignas(64) float scores[kAttentionRows * kAttentionChunk];
  const size_t rows = chunk->rows;
  size_t row = 0;
  for (; row + 4 <= rows; row += 4) score_rows<4>(*chunk, row, scores);
  for (; row + 3 <= rows; row += 3) score_rows<3>(*chunk, row, scores);
  for (; row < rows; ++row) score_rows<1>(*chunk, row, scores);
  for (row = 0; row < rows; ++row) {
    float* at = scores + row * kAttentionChunk;
    softmax_row(*chunk, row, at, [=](size_t i, F weights) { Simd::store(at + i, weights); });
  }
  memset(chunk->values, 0, rows * chunk->dim * sizeof(float));
  row = 0;
  for (; row + 4 <= rows; row += 4) value_rows<4>(*chunk, row, scores);
  for (; row + 3 <= rows; row += 3) value_rows<3>(*chunk, row, scores);
  for (; row < rows; ++row) value_rows<1>(*chunk, row, scores);
}

}  // namespace bfloat16
}  // namespace
