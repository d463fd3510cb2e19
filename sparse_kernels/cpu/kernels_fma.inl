// Matrix products by fused multiply-add of float32 inputs and weights widened from bfloat16: exact
// products, and as fast as dot products of bfloat16 pairs on CPUs that do one of those a cycle.
// Included after kernels_common.inl.

namespace {

constexpr size_t kChunk = 2 * kLanes;  // weights in one load

// A token's inputs, k floats: in each chunk first those at even places, then those at odd ones.
size_t operand_bytes(const Matrix* weights, size_t tokens) {
  return tokens * weights->columns * sizeof(float);
}

void store_operand(const Matrix* weights, const float* x, size_t n, size_t token, size_t,
                   void* operand) {
  const size_t k = weights->columns;
  float* out = static_cast<float*>(operand) + token * k;
  const size_t whole = n / kChunk * kChunk;
  for (size_t begin = 0; begin < whole; begin += kChunk) {
    for (size_t i = 0; i < kLanes; ++i) {
      out[begin + i] = x[begin + 2 * i];
      out[begin + kLanes + i] = x[begin + 2 * i + 1];
    }
  }
  for (size_t i = whole; i < k; ++i) {
    const size_t place = i / kChunk * kChunk + i % 2 * kLanes + i % kChunk / 2;
    out[place] = i < n ? x[i] : 0.0f;
  }
}

template <size_t kRows, size_t kTokens>
inline void dot_tile(const uint16_t* const* rows, size_t k, const float* inputs, float* out,
                     size_t out_stride) {
  F sums[kRows][kTokens];
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t token = 0; token < kTokens; ++token) sums[row][token] = Simd::zero();
  }
  for (size_t i = 0; i < k; i += kChunk) {
    F even[kRows], odd[kRows];
    for (size_t row = 0; row < kRows; ++row) {
      Simd::load_bf16(rows[row] + i, &even[row], &odd[row]);
    }
    for (size_t token = 0; token < kTokens; ++token) {
      const F x_even = Simd::load(inputs + token * k + i);
      const F x_odd = Simd::load(inputs + token * k + i + kLanes);
      for (size_t row = 0; row < kRows; ++row) {
        sums[row][token] = Simd::fma(even[row], x_even, sums[row][token]);
        sums[row][token] = Simd::fma(odd[row], x_odd, sums[row][token]);
      }
    }
  }
  for (size_t token = 0; token < kTokens; ++token) {
    for (size_t row = 0; row < kRows; ++row) {
      out[token * out_stride + row] = Simd::sum(sums[row][token]);
    }
  }
}

// A single token: more rows at once, to hide the latency of the sums.
constexpr size_t kSingleRows = 8;

// As many rows as are multiplied at once.
inline size_t rows_at_once(size_t tokens) { return tokens == 1 ? kSingleRows : Simd::kRows; }

void dot_rows(const uint16_t* const* rows, size_t k, const float* inputs, size_t tokens, float* out,
              size_t out_stride) {
  if (tokens == 1) return dot_tile<kSingleRows, 1>(rows, k, inputs, out, out_stride);
  size_t token = 0;
  for (; token + Simd::kTokens <= tokens; token += Simd::kTokens) {
    dot_tile<Simd::kRows, Simd::kTokens>(rows, k, inputs + token * k, out + token * out_stride,
                                         out_stride);
  }
  for (; token < tokens; ++token) {
    dot_tile<Simd::kRows, 1>(rows, k, inputs + token * k, out + token * out_stride, out_stride);
  }
}

void dot(const Matrix* weights, size_t first_row, size_t rows, const void* operand, size_t tokens,
         float* out, size_t out_stride) {
  const size_t step = rows_at_once(tokens);
  for (size_t row = 0; row < rows; row += step) {
    const uint16_t* at[kSingleRows];
    for (size_t i = 0; i < step; ++i) at[i] = bf16_row(*weights, first_row + row + i);
    dot_rows(at, weights->columns, static_cast<const float*>(operand), tokens, out + row,
             out_stride);
  }
}

void dot_chosen(const Matrix* weights, const ChosenRows* chosen, const void* operand, size_t tokens,
                float* out, size_t out_stride, Fetch* fetch) {
  const ChosenRows& rows = *chosen;
  const size_t step = rows_at_once(tokens);
  begin_fetch(fetch, (rows.count + step - 1) / step);
  alignas(64) float values[sk::kMaxChoiceTokens * kMostChosen];
  for (size_t i = 0; i < rows.count; i += step) {
    fetch_some(fetch);
    const uint16_t* at[kSingleRows];
    for (size_t j = 0; j < step; ++j) {
      at[j] = bf16_row(*weights, rows.at[at_most(i + j, rows.count - 1)]);
    }
    dot_rows(at, weights->columns, static_cast<const float*>(operand), tokens, values + i,
             kMostChosen);
  }
  spread(rows, values, kMostChosen, tokens, out, out_stride);
}

// Plain float32, [tokens, neurons].
size_t activation_bytes(size_t tokens, size_t neurons) { return tokens * neurons * sizeof(float); }

void swiglu(const SwigluTask* task) {
  for (size_t token = 0; token < task->tokens; ++token) {
    swiglu_row(*task, token,
               static_cast<float*>(task->activations) + token * task->neurons + task->first);
  }
}

template <size_t kTokens, size_t kVectors>
inline void down_tile(const DownTask& task, const Neurons& neurons, const Neurons& rows,
                      size_t column, size_t token) {
  const size_t stride = task.weights->stride / sizeof(uint16_t);
  const uint16_t* weights = bf16_row(*task.weights, 0) + task.first_column + column;
  const float* inputs = static_cast<const float*>(task.activations) + token * task.neurons;
  F even[kTokens][kVectors / 2], odd[kTokens][kVectors / 2];
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t i = 0; i < kVectors / 2; ++i) even[t][i] = odd[t][i] = Simd::zero();
  }
  for (size_t place = 0; place < rows.count; ++place) {
    const size_t neuron = neurons.at[place];
    const uint16_t* row = weights + rows.at[place] * stride;
    for (size_t i = 0; i < kVectors / 2; ++i) {
      F w_even, w_odd;
      Simd::load_bf16(row + i * kChunk, &w_even, &w_odd);
      for (size_t t = 0; t < kTokens; ++t) {
        const F a = Simd::set(inputs[t * task.neurons + neuron]);
        even[t][i] = Simd::fma(a, w_even, even[t][i]);
        odd[t][i] = Simd::fma(a, w_odd, odd[t][i]);
      }
    }
  }
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t i = 0; i < kVectors / 2; ++i) {
      F low, high;
      Simd::interleave(even[t][i], odd[t][i], &low, &high);
      float* to = task.out + (token + t) * task.out_stride + column + i * kChunk;
      if (task.add) {
        low = Simd::load(to) + low;
        high = Simd::load(to + kLanes) + high;
      }
      Simd::store(to, low);
      Simd::store(to + kLanes, high);
    }
  }
}

// From `column` on, as far as tiles of this width go; returns where they end.
template <size_t kVectors>
size_t down_columns(const DownTask& task, const Neurons& neurons, const Neurons& rows,
                    size_t column) {
  for (; column + kVectors * kLanes <= task.columns; column += kVectors * kLanes) {
    size_t token = 0;
    for (; token + Simd::kDownTokens <= task.tokens; token += Simd::kDownTokens) {
      down_tile<Simd::kDownTokens, kVectors>(task, neurons, rows, column, token);
    }
    for (; token < task.tokens; ++token) {
      down_tile<1, kVectors>(task, neurons, rows, column, token);
    }
  }
  return column;
}

// A single token's sums fit the registers for many columns: rows are read in long pieces.
constexpr size_t kSingleVectors = Simd::kLanes == 16 ? 12 : 8;

void down(const DownTask* task) {
  Neurons neurons, places;  // where activations are, and where weights are in a copy
  for (size_t n = task->first_neuron; n < task->last_neuron; n += 64) {
    const size_t block = (n - task->first_neuron) / 64;
    const BlockMask used = task->used == nullptr ? kWholeBlock : task->used[block];
    neurons.add(used, n);
    if (task->places != nullptr) add_rows_of(*task, block, used, &places);
  }
  const Neurons& rows = task->places == nullptr ? neurons : places;
  size_t column = 0;
  if (task->tokens == 1) column = down_columns<kSingleVectors>(*task, neurons, rows, column);
  column = down_columns<Simd::kDownVectors>(*task, neurons, rows, column);
  down_columns<2>(*task, neurons, rows, column);
}

void nothing() {}

Kernels make_kernels() {
  Kernels kernels = {};
  set_common(&kernels);
  set_attention(&kernels);
  kernels.begin_thread = nothing;
  kernels.end_thread = nothing;
  kernels.bfloat16 = {operand_bytes,    store_operand, dot, dot_chosen,
                      activation_bytes, swiglu,        down};
  kernels.integer16 = integer::products<16>();
  kernels.integer8 = integer::products<8>();
  return kernels;
}

}  // namespace
