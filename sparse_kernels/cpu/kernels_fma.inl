// Matrix products by fused multiply-add of float32 inputs and weights widened from bfloat16: exact
// products, and as fast as dot products of bfloat16 pairs on CPUs that do one of those a cycle.
// Included after kernels_common.inl.

namespace {

constexpr size_t kChunk = 2 * kLanes;  // weights in one load

// A token's inputs, k floats: in each chunk first those at even places, then those at odd ones.
size_t operand_bytes(size_t tokens, size_t k) { return tokens * k * sizeof(float); }

void store_operand(const float* x, size_t n, size_t k, size_t token, void* operand) {
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
inline void dot_tile(const uint16_t* const weights, size_t stride, size_t k, const float* inputs,
                     float* out, size_t out_stride) {
  F sums[kRows][kTokens];
  for (size_t row = 0; row < kRows; ++row) {
    for (size_t token = 0; token < kTokens; ++token) sums[row][token] = Simd::zero();
  }
  for (size_t i = 0; i < k; i += kChunk) {
    F even[kRows], odd[kRows];
    for (size_t row = 0; row < kRows; ++row) {
      Simd::load_bf16(weights + row * stride + i, &even[row], &odd[row]);
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

void dot(Rows weights, size_t rows, size_t k, const void* operand, size_t first_token,
         size_t tokens, float* out, size_t out_stride) {
  const float* inputs = static_cast<const float*>(operand) + first_token * k;
  if (tokens == 1) {
    for (size_t row = 0; row < rows; row += kSingleRows) {
      dot_tile<kSingleRows, 1>(weights.data + row * weights.stride, weights.stride, k, inputs,
                               out + row, out_stride);
    }
    return;
  }
  for (size_t row = 0; row < rows; row += Simd::kRows) {
    const uint16_t* at = weights.data + row * weights.stride;
    size_t token = 0;
    for (; token + Simd::kTokens <= tokens; token += Simd::kTokens) {
      dot_tile<Simd::kRows, Simd::kTokens>(at, weights.stride, k, inputs + token * k,
                                           out + token * out_stride + row, out_stride);
    }
    for (; token < tokens; ++token) {
      dot_tile<Simd::kRows, 1>(at, weights.stride, k, inputs + token * k,
                               out + token * out_stride + row, out_stride);
    }
  }
}

// Plain float32, [tokens, neurons].
size_t activation_bytes(size_t tokens, size_t neurons) { return tokens * neurons * sizeof(float); }

void swiglu(const float* gate, const float* up, size_t stride, size_t tokens, size_t block,
            size_t neurons, void* activations, float* plain, size_t plain_stride) {
  for (size_t token = 0; token < tokens; ++token) {
    float* out = static_cast<float*>(activations) + token * neurons + block * 32;
    for (size_t i = 0; i < 32; i += kLanes) {
      const size_t at = token * stride + i;
      Simd::store(out + i, silu(Simd::load(gate + at)) * Simd::load(up + at));
    }
    if (plain != nullptr) {
      memcpy(plain + token * plain_stride + block * 32, out, 32 * sizeof(float));
    }
  }
}

template <size_t kTokens, size_t kVectors>
inline void down_tile(const uint16_t* weights, size_t stride, size_t count, const float* activations,
                      size_t neurons, float* out, size_t out_stride, bool add) {
  F even[kTokens][kVectors / 2], odd[kTokens][kVectors / 2];
  for (size_t token = 0; token < kTokens; ++token) {
    for (size_t i = 0; i < kVectors / 2; ++i) even[token][i] = odd[token][i] = Simd::zero();
  }
  for (size_t neuron = 0; neuron < count; ++neuron) {
    for (size_t i = 0; i < kVectors / 2; ++i) {
      F w_even, w_odd;
      Simd::load_bf16(weights + neuron * stride + i * kChunk, &w_even, &w_odd);
      for (size_t token = 0; token < kTokens; ++token) {
        const F a = Simd::set(activations[token * neurons + neuron]);
        even[token][i] = Simd::fma(a, w_even, even[token][i]);
        odd[token][i] = Simd::fma(a, w_odd, odd[token][i]);
      }
    }
  }
  for (size_t token = 0; token < kTokens; ++token) {
    for (size_t i = 0; i < kVectors / 2; ++i) {
      F low, high;
      Simd::interleave(even[token][i], odd[token][i], &low, &high);
      float* to = out + token * out_stride + i * kChunk;
      if (add) {
        low = Simd::load(to) + low;
        high = Simd::load(to + kLanes) + high;
      }
      Simd::store(to, low);
      Simd::store(to + kLanes, high);
    }
  }
}

template <size_t kVectors>
size_t down_columns(const uint16_t* weights, size_t stride, size_t count, const float* activations,
                    size_t neurons, size_t columns, size_t tokens, float* out, size_t out_stride,
                    bool add) {
  size_t column = 0;
  for (; column + kVectors * kLanes <= columns; column += kVectors * kLanes) {
    size_t token = 0;
    for (; token + Simd::kDownTokens <= tokens; token += Simd::kDownTokens) {
      down_tile<Simd::kDownTokens, kVectors>(weights + column, stride, count,
                                             activations + token * neurons, neurons,
                                             out + token * out_stride + column, out_stride, add);
    }
    for (; token < tokens; ++token) {
      down_tile<1, kVectors>(weights + column, stride, count, activations + token * neurons,
                             neurons, out + token * out_stride + column, out_stride, add);
    }
  }
  return column;
}

// A single token's accumulators all fit the registers: rows are read nearly whole.
constexpr size_t kSingleVectors = Simd::kLanes == 16 ? 12 : 8;

void down(Rows weights, size_t neurons, size_t first_block, size_t last_block, size_t first_column,
          size_t columns, const void* activations, size_t tokens, float* out, size_t out_stride,
          bool add) {
  const size_t first = first_block * 32, count = (last_block - first_block) * 32;
  const uint16_t* at = weights.data + first * weights.stride + first_column;
  const float* inputs = static_cast<const float*>(activations) + first;
  size_t done = 0;
  if (tokens == 1) {
    done += down_columns<kSingleVectors>(at, weights.stride, count, inputs, neurons, columns, tokens,
                                         out, out_stride, add);
  }
  done += down_columns<Simd::kDownVectors>(at + done, weights.stride, count, inputs, neurons,
                                           columns - done, tokens, out + done, out_stride, add);
  down_columns<2>(at + done, weights.stride, count, inputs, neurons, columns - done, tokens,
                  out + done, out_stride, add);
}

void nothing() {}

Kernels make_kernels() {
  Kernels kernels = {};
  set_common(&kernels);
  kernels.begin_thread = nothing;
  kernels.end_thread = nothing;
  kernels.operand_bytes = operand_bytes;
  kernels.store_operand = store_operand;
  kernels.dot = dot;
  kernels.activation_bytes = activation_bytes;
  kernels.swiglu = swiglu;
  kernels.down = down;
  return kernels;
}

}  // namespace
