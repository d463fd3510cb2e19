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

void choose(const ChooseTask* task, Chosen* chosen) {
  const F bounds[] = {Simd::set(task->bounds[0]), Simd::set(task->bounds[1]),
                      Simd::set(task->bounds[2])};
  Chosen found = {};
  for (size_t i = 0; i < 64; i += kLanes) {
    const F gate = Simd::load(task->gate + i), factor = Simd::load(task->factors + i);
    const F sigmoid = Simd::set(1.0f) / (Simd::set(1.0f) + exp_of(Simd::zero() - gate));
    const F activated = gate * sigmoid;
    if (task->up == nullptr) {
      found.used |= Simd::not_below(Simd::abs(activated) * factor, bounds[0]) << i;
      continue;
    }
    const F up = Simd::load(task->up + i);
    const F importance = Simd::abs(activated * up) * factor;
    found.used |= Simd::not_below(importance, bounds[0]) << i;
    found.down_whole |= Simd::not_below(importance, bounds[2]) << i;
    const F slope = sigmoid + activated * (Simd::set(1.0f) - sigmoid);
    const F gates = slope * slope * Simd::load(task->gate_variance + i);
    const F ups = Simd::load(task->up_variance + i);
    const F variance = gates * (up * up + ups) + activated * activated * ups;
    found.whole |= Simd::not_below(variance * factor * factor, bounds[1] * bounds[1]) << i;
  }
  *chosen = found;
}

void add_rows(const Matrix* rows, const float* z, size_t count, float* out) {
  constexpr size_t kColumns = 64, kVectors = kColumns / kLanes;
  for (size_t begin = 0; begin < rows->columns; begin += kColumns) {
    F sums[kVectors];
    for (size_t i = 0; i < kVectors; ++i) sums[i] = Simd::load(out + begin + i * kLanes);
    for (size_t row = 0; row < count; ++row) {
      const uint16_t* weights = bf16_row(*rows, row) + begin;
      const F factor = Simd::set(z[row]);
      for (size_t i = 0; i < kVectors; ++i) {
        sums[i] = Simd::fma(factor, Simd::widen(weights + i * kLanes), sums[i]);
      }
    }
    for (size_t i = 0; i < kVectors; ++i) Simd::store(out + begin + i * kLanes, sums[i]);
  }
}

void group_squares(const float* x, size_t n, size_t group, float* out) {
  for (size_t begin = 0; begin < n; begin += group, ++out) {
    F sum = Simd::zero();
    size_t i = begin;
    const size_t end = at_most(begin + group, n);
    for (; i + kLanes <= end; i += kLanes) {
      const F v = Simd::load(x + i);
      sum = Simd::fma(v, v, sum);
    }
    float total = Simd::sum(sum);
    for (; i < end; ++i) total += x[i] * x[i];
    *out = total;
  }
}

void variance(const Matrix* high, size_t first_row, const float* squares, float* out) {
  const F factor = Simd::set((high->unit * high->unit - 1) / 12);
  for (size_t i = 0; i < 64; i += kLanes) {
    const size_t row = first_row + i;
    const uint16_t* scales = high->scales + row / 16 * high->groups * 16 + row % 16;
    F sum = Simd::zero();
    for (size_t g = 0; g < high->groups; ++g) {
      const F scale = Simd::load_half(scales + g * 16);
      sum = Simd::fma(scale * scale, Simd::set(squares[g]), sum);
    }
    Simd::store(out + i, sum * factor);
  }
}

float sum_of_squares(const float* a, size_t n) {
  F sums[2] = {Simd::zero(), Simd::zero()};
  size_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const F v = Simd::load(a + i), w = Simd::load(a + i + kLanes);
    sums[0] = Simd::fma(v, v, sums[0]);
    sums[1] = Simd::fma(w, w, sums[1]);
  }
  float total = Simd::sum(sums[0] + sums[1]);
  for (; i < n; ++i) total += a[i] * a[i];
  return total;
}

// A token's scores in steps of 2^-26: the sums of 16 fit 32 bits.
void add_norm_scores(const float* a, size_t stride, size_t tokens, size_t n, int64_t* sums) {
  const float* counted[16];
  F units[16];
  size_t count = 0;
  for (size_t t = 0; t < tokens; ++t) {
    const float total = sum_of_squares(a + t * stride, n);
    // A token whose activations are not finite scores nothing, like one whose are all zero.
    if (!(total > 1e-30f && total < kInfinity)) continue;
    units[count] = Simd::set(67108864.0f / total);
    counted[count++] = a + t * stride;
  }
  for (size_t i = 0; i < n; i += kLanes) {
    typename Simd::I sum = Simd::to_integers(Simd::zero());
    for (size_t t = 0; t < count; ++t) {
      const F v = Simd::load(counted[t] + i);
      sum = Simd::add(sum, Simd::to_integers(v * v * units[t]));
    }
    alignas(64) int32_t steps[kLanes];
    Simd::store_integers(steps, sum);
    const size_t lanes = at_most(kLanes, n - i);
    for (size_t j = 0; j < lanes; ++j) sums[i + j] += int64_t{steps[j]} * 64;
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
      const F error = Simd::fma(factor_b, Simd::load(across + i), factor_a * Simd::load(along + i));
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
  kernels->choose = choose;
  kernels->add_rows = add_rows;
  kernels->group_squares = group_squares;
  kernels->variance = variance;
  kernels->sum_of_squares = sum_of_squares;
  kernels->add_norm_scores = add_norm_scores;
  kernels->embed = embed;
  kernels->largest = largest;
  kernels->sum_of_exp = sum_of_exp;
  kernels->within_reach = within_reach;
  kernels->all_finite = all_finite;
}

}  // namespace
