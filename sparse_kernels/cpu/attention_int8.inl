// Keys and values in bytes, with a scale for each token and head:
//
//   element = scale * (byte - 128),   scale = bfloat16(largest |x| / 127)
//
// Queries, and the weights of a chunk times the values' scales, are rounded to 16 bits with a scale
// of their own, so that both products are sums of whole numbers, exact in any order. What stands
// beyond the last position may be anything: its bytes get the weight 0, its scales count nowhere.
//
// A block of a head: keys [dim / 4][16 positions][4 dimensions], values [4 quads of positions][dim]
// [4 positions], 16 scales of the keys, 16 of the values. It is a multiple of 64 bytes.

namespace {
namespace int8 {

constexpr float kTiny = 1e-30f;  // what is smaller counts as zero: its reciprocal may be no number
constexpr uint32_t kZero = 128;

inline const uint16_t* key_scales(const uint8_t* block, size_t dim) {
  return reinterpret_cast<const uint16_t*>(block + 32 * dim);
}
inline const uint16_t* value_scales(const uint8_t* block, size_t dim) {
  return key_scales(block, dim) + 16;
}

// Largest |x|; a NaN is added to it if one is not finite.
inline float magnitude(const float* x, size_t n) {
  F top = Simd::zero(), wrong = Simd::zero();
  for (size_t i = 0; i < n; i += kLanes) {
    const F v = Simd::load(x + i);
    top = Simd::max(top, Simd::max(v, Simd::zero() - v));
    wrong = wrong + v * Simd::zero();
  }
  return Simd::largest(top) + Simd::sum(wrong);
}

// x [dim] of one token -> its bytes, and its scale, which is NaN if one of x is not finite.
// Rounding makes a scale smaller by at most 2^-8 of it: no code passes 127.
inline uint16_t store_bytes(const float* x, size_t dim, uint8_t* bytes) {
  const uint16_t scale = bf16_of(magnitude(x, dim) / 127.0f);
  const F factor = Simd::set(float_of(scale) > kTiny ? 1.0f / float_of(scale) : 0.0f);
  for (size_t i = 0; i < dim; i += kLanes) {
    int32_t codes[kLanes];
    Simd::store_integers(codes, Simd::to_integers(Simd::load(x + i) * factor));
    for (size_t lane = 0; lane < kLanes; ++lane) {
      bytes[i + lane] = static_cast<uint8_t>(kZero + static_cast<uint32_t>(codes[lane]));
    }
  }
  return scale;
}

void append_key(const float* key, size_t dim, size_t offset, uint8_t* block) {
  uint8_t bytes[kMaxHeadDim];
  const uint16_t scale = store_bytes(key, dim, bytes);
  for (size_t i = 0; i < dim; i += 4) memcpy(block + i * 16 + offset * 4, bytes + i, 4);
  memcpy(block + 32 * dim + 2 * offset, &scale, sizeof(scale));
}

void append_value(const float* value, size_t dim, size_t offset, uint8_t* block) {
  uint8_t bytes[kMaxHeadDim];
  const uint16_t scale = store_bytes(value, dim, bytes);
  uint8_t* to = block + 16 * dim + offset / 4 * dim * 4 + offset % 4;
  for (size_t i = 0; i < dim; ++i) to[4 * i] = bytes[i];
  memcpy(block + 32 * dim + 32 + 2 * offset, &scale, sizeof(scale));
}

// Numbers rounded to whole multiples of a scale.
struct Rounded {
  const int32_t* quads;
  float scale;
  int32_t offset;  // -128 times their sum: what the bytes' zero adds to a dot product
};

// x [n], of magnitude `largest`; multiples up to `limit`.
inline Rounded round_to(float limit, const float* x, size_t n, float largest, int32_t* quads) {
  const F factor = Simd::set(largest > kTiny ? limit / largest : 0.0f);
  Simd::I sum = Simd::to_integers(Simd::zero());
  for (size_t i = 0; i < n; i += kLanes) {
    const Simd::I codes = Simd::to_integers(Simd::load(x + i) * factor);
    Simd::put_quads(quads + i / 2, codes);
    sum = Simd::add(sum, codes);
  }
  const uint32_t total = static_cast<uint32_t>(Simd::sum(sum));
  return {quads, largest / limit, static_cast<int32_t>(0u - kZero * total)};
}

// Scores of kRows queries with the 16 positions of each of kBlocks blocks.
template <size_t kRows, size_t kBlocks>
void score_blocks(const Rounded* queries, size_t dim, const uint8_t* const* blocks, float* scores) {
  for (size_t lane = 0; lane < 16; lane += kLanes) {
    Simd::Dots dots[kRows][kBlocks];
    for (size_t row = 0; row < kRows; ++row) {
      for (size_t i = 0; i < kBlocks; ++i) dots[row][i] = Simd::dots(queries[row].offset);
    }
    for (size_t quad = 0; quad < dim / 4; ++quad) {
      Simd::Bytes keys[kBlocks];
      for (size_t i = 0; i < kBlocks; ++i) {
        keys[i] = Simd::load_bytes(blocks[i] + (quad * 16 + lane) * 4);
      }
      for (size_t row = 0; row < kRows; ++row) {
        for (size_t i = 0; i < kBlocks; ++i) {
          Simd::add_dots(&dots[row][i], keys[i], queries[row].quads + 2 * quad);
        }
      }
    }
    for (size_t i = 0; i < kBlocks; ++i) {
      const F scales = Simd::widen(key_scales(blocks[i], dim) + lane);
      for (size_t row = 0; row < kRows; ++row) {
        Simd::store(scores + row * kAttentionChunk + i * 16 + lane,
                    Simd::total(dots[row][i]) * (scales * Simd::set(queries[row].scale)));
      }
    }
  }
}

template <size_t kRows>
void score_rows(const AttentionChunk& chunk, size_t row, float* scores) {
  const size_t count = blocks_of(chunk), dim = chunk.dim;
  // A dot product of a query with bytes of up to 127 stays below 2^31.
  const float limit = dim > 512 ? Simd::kLargestCode / 2 : Simd::kLargestCode;
  int32_t quads[kRows][kMaxHeadDim / 2];
  Rounded queries[kRows];
  for (size_t i = 0; i < kRows; ++i) {
    const float* query = chunk.queries + (row + i) * dim;
    queries[i] = round_to(limit, query, dim, magnitude(query, dim), quads[i]);
  }
  float* to = scores + row * kAttentionChunk;
  size_t block = 0;
  for (; block + 2 <= count; block += 2) {
    const uint8_t* blocks[2] = {block_of(chunk, block), block_of(chunk, block + 1)};
    if (row == 0) {  // the values that follow are fetched while values are read
      prefetch(chunk, block, 0, 16 * dim);
      prefetch(chunk, block + 1, 0, 16 * dim);
    }
    score_blocks<kRows, 2>(queries, dim, blocks, to + block * 16);
  }
  if (block < count) {
    const uint8_t* blocks[1] = {block_of(chunk, block)};
    score_blocks<kRows, 1>(queries, dim, blocks, to + block * 16);
  }
}

// Scores [positions of the chunk] of a row become weight * scale of the value, and these multiples.
inline Rounded weigh(const AttentionChunk& chunk, size_t row, float* scores, int32_t* quads) {
  F top = Simd::zero(), wrong = Simd::zero();
  softmax_row(chunk, row, scores, [&](size_t i, F weights) {
    const F scales = Simd::widen(value_scales(block_of(chunk, i / 16), chunk.dim) + i % 16);
    const F products = keep_seen(chunk, row, i, weights * scales, 0);
    top = Simd::max(top, products);
    wrong = wrong + products * Simd::zero();
    Simd::store(scores + i, products);
  });
  const float largest = Simd::largest(top) + Simd::sum(wrong);
  return round_to(Simd::kLargestCode, scores, blocks_of(chunk) * 16, largest, quads);
}

// Columns [column, column + kVectors * kLanes) of the results of kRows rows, the first of them
// `row`.
template <size_t kRows, size_t kVectors>
void mix_columns(const AttentionChunk& chunk, const Rounded* weights, size_t row, size_t column) {
  const size_t count = blocks_of(chunk), dim = chunk.dim;
  Simd::Dots dots[kRows][kVectors];
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t i = 0; i < kVectors; ++i) dots[r][i] = Simd::dots(weights[r].offset);
  }
  for (size_t block = 0; block < count; ++block) {
    if (row + column == 0) prefetch(chunk, block, 16 * dim, 16 * dim + 64);
    const uint8_t* at = block_of(chunk, block) + 16 * dim + column * 4;
    for (size_t quad = block * 4; quad < block * 4 + 4; ++quad, at += 4 * dim) {
      Simd::Bytes bytes[kVectors];
      for (size_t i = 0; i < kVectors; ++i) bytes[i] = Simd::load_bytes(at + i * kLanes * 4);
      for (size_t r = 0; r < kRows; ++r) {
        for (size_t i = 0; i < kVectors; ++i) {
          Simd::add_dots(&dots[r][i], bytes[i], weights[r].quads + 2 * quad);
        }
      }
    }
  }
  for (size_t r = 0; r < kRows; ++r) {
    for (size_t i = 0; i < kVectors; ++i) {
      Simd::store(chunk.values + (row + r) * dim + column + i * kLanes,
                  Simd::total(dots[r][i]) * Simd::set(weights[r].scale));
    }
  }
}

template <size_t kRows>
void value_rows(const AttentionChunk& chunk, size_t row, float* scores) {
  int32_t quads[kRows][kAttentionChunk / 2];
  Rounded weights[kRows];
  for (size_t i = 0; i < kRows; ++i) {
    weights[i] = weigh(chunk, row + i, scores + (row + i) * kAttentionChunk, quads[i]);
  }
  // As many sums as there are registers for.
  constexpr size_t kVectors = kLanes == 16 && kRows == 1 ? 4 : 2;
  size_t column = 0;
  for (; column + kVectors * kLanes <= chunk.dim; column += kVectors * kLanes) {
    mix_columns<kRows, kVectors>(chunk, weights, row, column);
  }
  for (; column < chunk.dim; column += kLanes) mix_columns<kRows, 1>(chunk, weights, row, column);
}

void attend(const AttentionChunk* chunk) {
  alignas(64) float scores[kAttentionRows * kAttentionChunk];
  const size_t rows = chunk->rows;
  size_t row = 0;
  for (; row + 4 <= rows; row += 4) score_rows<4>(*chunk, row, scores);
  for (; row + 3 <= rows; row += 3) score_rows<3>(*chunk, row, scores);
  for (; row < rows; ++row) score_rows<1>(*chunk, row, scores);
  row = 0;
  for (; row + 4 <= rows; row += 4) value_rows<4>(*chunk, row, scores);
  for (; row + 3 <= rows; row += 3) value_rows<3>(*chunk, row, scores);
  for (; row < rows; ++row) value_rows<1>(*chunk, row, scores);
}

}  // namespace int8

void set_attention(Kernels* kernels) {
  kernels->kv_bfloat16 = {bfloat16::append_key, bfloat16::append_value, bfloat16::attend};
  kernels->kv_int8 = {int8::append_key, int8::append_value, int8::attend};
}

}  // namespace
