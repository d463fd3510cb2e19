// What is counted of neurons: those that tokens read, and their scores.
#pragma once

#include "block.cuh"

namespace sk {
namespace cuda {

// Of a row of masks, by one warp. Rows are of whole blocks of neurons: a multiple of 4 words.
__device__ inline uint32_t count_mask(const uint16_t* mask, uint32_t words) {
  const uint32_t* pairs = reinterpret_cast<const uint32_t*>(mask);
  uint32_t count = 0;
#pragma unroll 4
  for (uint32_t i = lane(); i < words / 2; i += 32) {
    count += static_cast<uint32_t>(count_bits(read_shared(pairs + i)));
  }
  return warp_sum(count);
}

SK_KERNEL(count_reads, CountArgs) {
  const uint32_t units = (args.sequences + 1) * kReadKinds;
  for (uint32_t unit = warp(); unit < units; unit += kWarps) {
    const uint32_t sequence = unit / kReadKinds, kind = unit % kReadKinds;
    const uint16_t* masks = args.masks + uint64_t{kind} * (args.rows + 1) * args.words;
    const bool all = sequence == args.sequences;
    uint32_t count = all ? count_mask(masks + uint64_t{args.rows} * args.words, args.words) : 0;
    for (uint32_t row = 0; !all && row < args.rows; ++row) {
      if (read_shared(&args.tokens[row].sequence) != sequence) continue;
      count += count_mask(masks + uint64_t{row} * args.words, args.words);
    }
    if (lane() != 0) continue;
    args.reads[(uint64_t{sequence} * args.layers + args.layer) * kReadKinds + kind] = count;
  }
}

// A token's scores in steps of 2^-26, as on the CPU: the sums of 16 fit 32 bits.
constexpr float kSteps = 67108864.0f;
constexpr int64_t kStep = 64;  // in units of 2^-32
constexpr int64_t kOne = int64_t{1} << 32;

__device__ inline void add_norm_scores(const float* activations, const StatisticsArgs& args,
                                       uint32_t tokens, int64_t* sums) {
  __shared__ float factors[kBlockPositions];  // 0: the token scores nothing
  for (uint32_t t = 0; t < tokens; ++t) {
    const float total = sum_of_squares(activations + uint64_t{t} * args.stride, args.neurons);
    // Neither does one whose activations are not finite, nor one whose are all zero.
    const bool counts = total > 1e-30f && total < float_of_bits(kInfinityBits);
    if (threadIdx.x == 0) factors[t] = counts ? kSteps / total : 0.0f;
  }
  sync_threads();
  for (uint32_t i = threadIdx.x; i < args.neurons; i += kThreads) {
    int32_t steps = 0;
    for (uint32_t t = 0; t < tokens; ++t) {
      if (factors[t] == 0) continue;
      const float v = read_shared(activations + uint64_t{t} * args.stride + i);
      steps += round_to_int(v * v * factors[t]);
    }
    sums[i] += steps * kStep;
  }
}

// One more for the neurons of a token that a count counts: a share of all by |a|, or of those with
// a > 0 by a. Of neurons that are just as large the lower ones.
__device__ inline void add_counts(const float* a, uint32_t neurons, bool positive, float share,
                                  int64_t* sums) {
  if (!(sum_of_squares(a, neurons) < float_of_bits(kInfinityBits))) return;
  const auto key_of = [=](uint32_t i, uint32_t* key) {
    const float v = read_shared(a + i);
    *key = bits_of_float(v) & 0x7fffffffu;
    return !positive || v > 0;
  };
  float own = 0;  // whole numbers, exact
  for (uint32_t i = threadIdx.x; i < neurons; i += kThreads) {
    uint32_t key;
    own += key_of(i, &key) ? 1.0f : 0.0f;
  }
  const double eligible = static_cast<double>(share) * static_cast<double>(block_sum(own));
  const uint32_t below = static_cast<uint32_t>(eligible);
  const uint32_t counted = below + (static_cast<double>(below) < eligible ? 1u : 0u);
  if (counted == 0) return;
  const Largest largest = find_largest(neurons, counted, key_of);
  const uint32_t end = end_of_ties(neurons, largest, key_of);
  for (uint32_t i = threadIdx.x; i < neurons; i += kThreads) {
    uint32_t key;
    if (!key_of(i, &key) || key < largest.least) continue;
    if (key > largest.least || i < end) sums[i] += kOne;
  }
}

SK_KERNEL(statistics, StatisticsArgs) {
  const StatisticsUnit unit = args.units[blockIdx.x];
  const float* activations = args.activations + uint64_t{unit.row} * args.stride;
  int64_t* sums = unit.sums + uint64_t{args.layer} * args.widest;
  if (unit.score == kScoreNorm) return add_norm_scores(activations, args, unit.count, sums);
  for (uint32_t t = 0; t < unit.count; ++t) {
    add_counts(activations + uint64_t{t} * args.stride, args.neurons,
               unit.score == kScoreSignedCount, unit.share, sums);
  }
}

}  // namespace cuda
}  // namespace sk
