// Kernels that are the same on all levels, in terms of Simd; those of matrices are elsewhere.
#include "kernels_math.inl"

namespace {

void embed(const void* weights, size_t n, float* out) {
  const uint16_t* row = static_cast<const uint16_t*>(weights);
  for (size_t i = 0; i < n; ++i) out[i] = float_of(row[i]);
}

bool all_finite(const uint16_t* row, size_t n) {
  uint32_t found = 0;
  for (size_t i = 0; i < n; ++i) found |= (row[i] & 0x7f80u) == 0x7f80u ? 1u : 0u;
  return found == 0;
}

void rms_norm(const float* x, const float* weight, size_t n, float eps, float* out) {
  F squares = Simd::zero();
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = Simd::load(x + i);
    squares = Simd::fma(v, v, squares);
  }
  float total = Simd::sum(squares);
  for (size_t j = i; j < n; ++j) total += x[j] * x[j];
  const float factor = 1.0f / sqrtf(total / static_cast<float>(n) + eps);
  for (size_t j = 0; j < n; ++j) out[j] = x[j] * factor * weight[j];
}

void sum_rows(const float* rows, size_t stride, size_t count, size_t n, float* out) {
  constexpr size_t kVectors = 32 / kLanes;
  for (size_t i = 0; i < n; i += 32) {
    F sums[kVectors];
    for (size_t j = 0; j < kVectors; ++j) sums[j] = Simd::load(rows + i + j * kLanes);
    for (size_t row = 1; row < count; ++row) {
      const float* at = rows + row * stride + i;
      for (size_t j = 0; j < kVectors; ++j) sums[j] = sums[j] + Simd::load(at + j * kLanes);
    }
    for (size_t j = 0; j < kVectors; ++j) Simd::store(out + i + j * kLanes, sums[j]);
  }
}

void finish_heads(const HeadTask* task) {
  const size_t half = task->head_dim / 2;
  for (size_t token = 0; token < task->tokens; ++token) {
    float* head = task->heads + token * task->stride;
    if (task->bias != nullptr) {
      for (size_t i = 0; i < task->head_dim; ++i) head[i] += task->bias[i];
    }
    if (task->norm != nullptr) rms_norm(head, task->norm, task->head_dim, task->eps, head);
    if (task->cos == nullptr) continue;
    const float* cos = task->cos + token * half;
    const float* sin = task->sin + token * half;
    for (size_t i = 0; i < half; ++i) {
      const float first = head[i], second = head[half + i];
      head[i] = (first * cos[i] - second * sin[i]) * task->scale;
      head[half + i] = (second * cos[i] + first * sin[i]) * task->scale;
    }
  }
}

// Keys of a block: [dim / 2][16 positions][2 dimensions].
void append_key(const float* key, size_t dim, size_t offset, uint16_t* block) {
  for (size_t i = 0; i < dim; i += 2) {
    uint16_t* pair = block + (i / 2 * 16 + offset) * 2;
    pair[0] = bf16_of(key[i]);
    pair[1] = bf16_of(key[i + 1]);
  }
}

// Values of a block, after its keys: [8 pairs of positions][dim][2 positions].
void append_value(const float* value, size_t dim, size_t offset, uint16_t* block) {
  uint16_t* pairs = block + 16 * dim + offset / 2 * dim * 2 + offset % 2;
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
        const F first = Simd::set(queries[row * dim + i]), second = Simd::set(queries[row * dim + i + 1]);
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
    for (size_t i = 0; i < kVectors; ++i) sums[row][i] = Simd::load(values + row * dim + i * kLanes);
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
    for (size_t i = 0; i < kVectors; ++i) Simd::store(values + row * dim + i * kLanes, sums[row][i]);
  }
}

inline const uint16_t* block_of(const AttentionChunk& chunk, size_t index) {
  return chunk.kv + static_cast<size_t>(chunk.block_table[chunk.begin / 16 + index]) * chunk.block_stride;
}

template <size_t kRows>
void score_rows(const AttentionChunk& chunk, size_t row, float* scores) {
  const size_t blocks = (chunk.end - chunk.begin + 15) / 16;
  const float* queries = chunk.queries + row * chunk.dim;
  float* to = scores + row * kAttentionChunk;
  size_t block = 0;
  for (; block + 2 <= blocks; block += 2) {
    const uint16_t* keys[2] = {block_of(chunk, block), block_of(chunk, block + 1)};
    if (row == 0) {  // what the next blocks and the values will need
      for (size_t i = block + 2; i < block + 4 && i < blocks; ++i) {
        prefetch(block_of(chunk, i), 32 * chunk.dim);
      }
      for (const uint16_t* at : keys) prefetch(at + 16 * chunk.dim, 32 * chunk.dim);
    }
    score_blocks<kRows, 2>(queries, chunk.dim, keys, to + block * 16);
  }
  if (block < blocks) {
    const uint16_t* keys[1] = {block_of(chunk, block)};
    score_blocks<kRows, 1>(queries, chunk.dim, keys, to + block * 16);
  }
}

template <size_t kRows>
void value_rows(const AttentionChunk& chunk, size_t row, const float* weights) {
  const size_t dim = chunk.dim;
  for (uint32_t begin = chunk.begin; begin < chunk.end; begin += 16) {
    const uint16_t* values = block_of(chunk, (begin - chunk.begin) / 16) + 16 * dim;
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

// Scores become exp(score - largest) of what each row sees, zero of the rest.
void softmax_rows(const AttentionChunk& chunk, float* scores) {
  const int32_t begin = static_cast<int32_t>(chunk.begin);
  const size_t width = (chunk.end - chunk.begin + 15) / 16 * 16;
  for (size_t row = 0; row < chunk.rows; ++row) {
    float* at = scores + row * kAttentionChunk;
    F largest = Simd::set(-kInfinity);
    for (size_t i = 0; i < width; i += kLanes) {
      const int32_t lane = begin + static_cast<int32_t>(i);
      const F v = Simd::keep(Simd::load(at + i), chunk.first[row] - lane, chunk.last[row] - lane,
                             Simd::set(-kInfinity));
      largest = Simd::max(largest, v);
    }
    const float top = Simd::largest(largest);
    F total = Simd::zero();
    for (size_t i = 0; i < width; i += kLanes) {
      const int32_t lane = begin + static_cast<int32_t>(i);
      const F v = Simd::keep(exp_of(Simd::load(at + i) - Simd::set(top)), chunk.first[row] - lane,
                             chunk.last[row] - lane, Simd::zero());
      total = total + v;
      Simd::store(at + i, v);
    }
    chunk.largest[row] = top;
    chunk.total[row] = Simd::sum(total);
  }
}

void attend(const AttentionChunk* chunk) {
  alignas(64) float scores[kAttentionRows * kAttentionChunk];
  const size_t rows = chunk->rows;
  size_t row = 0;
  for (; row + 4 <= rows; row += 4) score_rows<4>(*chunk, row, scores);
  for (; row + 3 <= rows; row += 3) score_rows<3>(*chunk, row, scores);
  for (; row < rows; ++row) score_rows<1>(*chunk, row, scores);
  softmax_rows(*chunk, scores);
  memset(chunk->values, 0, rows * chunk->dim * sizeof(float));
  row = 0;
  for (; row + 4 <= rows; row += 4) value_rows<4>(*chunk, row, scores);
  for (; row + 3 <= rows; row += 3) value_rows<3>(*chunk, row, scores);
  for (; row < rows; ++row) value_rows<1>(*chunk, row, scores);
}

double sum_of_squares(const float* a, size_t n) {
  double sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (size_t lane = 0; lane < 8; ++lane) {
      const double v = a[i + lane];
      sums[lane] += v * v;
    }
  }
  for (; i < n; ++i) {
    const double v = a[i];
    sums[0] += v * v;
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

void add_norm_scores(const float* a, size_t n, double total, int64_t* sums) {
  // A token whose activations are not finite scores nothing, like one whose are all zero.
  if (!(total > 0 && total < static_cast<double>(kInfinity))) return;
  const double units = 4294967296.0 / total;
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the low bits.
  const double magic = 6755399441055744.0;
  for (size_t i = 0; i < n; ++i) {
    const double v = a[i];
    const double rounded = v * v * units + magic;
    int64_t bits, zero;
    memcpy(&bits, &rounded, sizeof(bits));
    memcpy(&zero, &magic, sizeof(zero));
    sums[i] += bits - zero;
  }
}

float largest(const float* x, size_t n) {
  F top = Simd::set(-kInfinity);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) top = Simd::max(Simd::load(x + i), top);
  float result = Simd::largest(top);
  for (; i < n; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

size_t within_reach(const float* values, const float* along, const float* across, size_t n, float a,
                    float b, float bound, uint32_t* places) {
  const F factor_a = Simd::set(a), factor_b = Simd::set(b);
  size_t found = 0;
  for (size_t i = 0; i < n; i += kLanes) {
    alignas(64) float most[kLanes] = {};
    const size_t lanes = n - i < kLanes ? n - i : kLanes;
    if (lanes == kLanes) {
      const F error =
          Simd::fma(factor_b, Simd::load(across + i), factor_a * Simd::load(along + i));
      const F v = Simd::load(values + i) + error;
      // Not a number if one of them is not: then they are looked at one by one.
      if (Simd::largest(v) < bound && Simd::sum(Simd::fma(v, Simd::zero(), Simd::zero())) == 0.0f) {
        continue;
      }
      Simd::store(most, v);
    } else {
      for (size_t j = 0; j < lanes; ++j) {
        most[j] = values[i + j] + (b * across[i + j] + a * along[i + j]);
      }
    }
    for (size_t j = 0; j < lanes; ++j) {
      places[found] = static_cast<uint32_t>(i + j);
      found += !(most[j] < bound);
    }
  }
  return found;
}

double sum_of_exp(const float* x, size_t n, float largest, float factor) {
  double total = 0;
  for (size_t begin = 0; begin < n; begin += 4096) {
    const size_t end = n - begin < 4096 ? n : begin + 4096;
    F sum = Simd::zero();
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      sum = sum + exp_of((Simd::load(x + i) - Simd::set(largest)) * Simd::set(factor));
    }
    float tail[kLanes] = {};
    for (size_t j = i; j < end; ++j) tail[j - i] = x[j];
    if (i < end) {
      const F v = exp_of((Simd::load(tail) - Simd::set(largest)) * Simd::set(factor));
      sum = sum + Simd::keep(v, 0, static_cast<int32_t>(end - i) - 1, Simd::zero());
    }
    total += static_cast<double>(Simd::sum(sum));
  }
  return total;
}

// The kernels of this file; those of the matrix products are the level's own.
void set_common(Kernels* kernels) {
  kernels->rms_norm = rms_norm;
  kernels->sum_rows = sum_rows;
  kernels->finish_heads = finish_heads;
  kernels->append_key = append_key;
  kernels->append_value = append_value;
  kernels->attend = attend;
  kernels->sum_of_squares = sum_of_squares;
  kernels->add_norm_scores = add_norm_scores;
  kernels->embed = embed;
  kernels->largest = largest;
  kernels->sum_of_exp = sum_of_exp;
  kernels->within_reach = within_reach;
  kernels->all_finite = all_finite;
}

}  // namespace
