// The likeliest tokens of a row of logits.
#pragma once

#include "block.cuh"

namespace sk {
namespace cuda {

// Larger for the larger logit: 0 for what is not a number, -0 as 0.
__device__ inline uint32_t key_of_logit(float logit) {
  const uint32_t bits = bits_of_float(logit);
  if (logit != logit) return 0;
  if (logit == 0) return 0x80000000u;
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// A key that kThreads of the logits reach, if there are so many: the smallest of the threads' own
// largest ones. Few others do, which makes the search among them short.
__device__ inline uint32_t reached_key(const float* logits, uint32_t vocab) {
  __shared__ uint32_t smallest[kWarps];
  uint32_t key = 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < vocab; i += kThreads) {
    const uint32_t own = key_of_logit(read_shared(logits + i));
    key = own > key ? own : key;
  }
  for (int mask = 16; mask != 0; mask /= 2) {
    const uint32_t other = shuffle_xor(key, mask);
    key = other < key ? other : key;
  }
  if (lane() == 0) smallest[warp()] = key;
  sync_threads();
  for (int i = 0; i < kWarps; ++i) key = smallest[i] < key ? smallest[i] : key;
  return key;
}

// The kept largest logits, of equal ones those with the smaller ids, as ranks: key, then ~id. In
// no order.
__device__ inline void gather_ranks(const float* logits, uint32_t vocab, uint32_t kept,
                                    uint64_t* ranks) {
  __shared__ int32_t count;
  const uint32_t reached = reached_key(logits, vocab);
  const auto key_of = [=](uint32_t i, uint32_t* key) {
    *key = key_of_logit(read_shared(logits + i));
    return *key >= reached;
  };
  const Largest largest = find_largest(vocab, kept, key_of);
  const uint32_t end = end_of_ties(vocab, largest, key_of);
  if (threadIdx.x == 0) count = 0;
  ranks[threadIdx.x] = 0;
  sync_threads();
  for (uint32_t i = threadIdx.x; i < vocab; i += kThreads) {
    const uint32_t key = key_of_logit(read_shared(logits + i));
    if (key < largest.least || (key == largest.least && i >= end)) continue;
    ranks[atomic_add_shared(&count, 1)] = uint64_t{key} << 32 | ~i;
  }
  sync_threads();
}

// Descending; kThreads of them. A bitonic sort.
__device__ inline void sort_ranks(uint64_t* ranks) {
  for (uint32_t size = 2; size <= kThreads; size *= 2) {
    for (uint32_t step = size / 2; step != 0; step /= 2) {
      const uint32_t place = threadIdx.x, other = place ^ step;
      const bool descending = (place & size) == 0;
      if (other > place && (ranks[place] < ranks[other]) == descending) {
        const uint64_t rank = ranks[place];
        ranks[place] = ranks[other];
        ranks[other] = rank;
      }
      sync_threads();
    }
  }
}

constexpr float kLargestFloat = 3.402823466e38f;
constexpr uint32_t kExpTerms = 16;  // added up in float32, their sums in float64

__device__ inline double sum_of_exp(const float* logits, uint32_t vocab, float top, float factor) {
  __shared__ double totals[kThreads];
  double total = 0;
  for (uint32_t begin = threadIdx.x; begin < vocab; begin += kExpTerms * kThreads) {
    float sum = 0;
    for (uint32_t term = 0; term < kExpTerms; ++term) {
      const uint32_t i = begin + term * kThreads;
      if (i < vocab) sum += exponential((read_shared(logits + i) - top) * factor);
    }
    total += static_cast<double>(sum);
  }
  sync_threads();
  totals[threadIdx.x] = total;
  for (uint32_t half = kThreads / 2; half != 0; half /= 2) {
    sync_threads();
    if (threadIdx.x < half) totals[threadIdx.x] += totals[threadIdx.x + half];
  }
  sync_threads();
  return totals[0];
}

SK_KERNEL(candidates, CandidatesArgs) {
  static_assert(kMostCandidates <= kThreads, "a thread for each");
  __shared__ uint64_t ranks[kThreads];
  const uint32_t row = blockIdx.x, place = threadIdx.x;
  const float* logits = args.logits + uint64_t{row} * args.vocab;
  gather_ranks(logits, args.vocab, args.kept, ranks);
  sort_ranks(ranks);
  if (place < args.kept) {
    const uint32_t id = ~static_cast<uint32_t>(ranks[place]);
    args.ids[uint64_t{row} * args.kept + place] = static_cast<int32_t>(id);
    args.values[uint64_t{row} * args.kept + place] = read_shared(logits + id);
  }
  const float top = read_shared(logits + ~static_cast<uint32_t>(ranks[0]));
  const float temperature = read_shared(args.temperatures + row);
  // Infinity times the distance 0 of the largest would not be a number.
  const float inverse = 1.0f / temperature;
  const float factor = inverse < kLargestFloat ? inverse : kLargestFloat;
  const double plain = sum_of_exp(logits, args.vocab, top, 1.0f);
  const double tempered = temperature == 1.0f ? plain : sum_of_exp(logits, args.vocab, top, factor);
  if (place != 0) return;
  args.log_normalizers_1[row] = static_cast<float>(logarithm(plain));
  args.log_normalizers[row] = static_cast<float>(logarithm(tempered));
}

}  // namespace cuda
}  // namespace sk
