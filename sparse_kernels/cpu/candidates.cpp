#include "candidates.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

namespace sk {
namespace {

constexpr size_t kBlock = 64;

// Larger for the better candidate: by logit, then by the smaller id.
uint64_t rank(float logit, size_t id) {
  uint32_t bits;
  std::memcpy(&bits, &logit, sizeof(bits));
  if (logit != logit) {
    bits = 0;
  } else if (logit == 0) {
    bits = 0x80000000u;  // -0 equals 0
  } else {
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return (uint64_t{bits} << 32) | (0xffffffffu - static_cast<uint32_t>(id));
}

uint32_t id_of(uint64_t rank) { return 0xffffffffu - static_cast<uint32_t>(rank); }

}  // namespace

void choose_candidates(const Kernels& kernels, const float* logits, size_t vocab, size_t kept,
                       int32_t* ids, float* values) {
  // The kept-th largest of the blocks' maxima: at least `kept` logits reach it.
  const size_t blocks = (vocab + kBlock - 1) / kBlock;
  std::vector<float> maxima(blocks);
  for (size_t block = 0; block < blocks; ++block) {
    const size_t first = block * kBlock;
    maxima[block] = kernels.largest(logits + first, std::min(kBlock, vocab - first));
  }
  float bound = -__builtin_huge_valf();
  if (blocks >= kept) {
    std::vector<float> ordered = maxima;
    std::nth_element(ordered.begin(), ordered.begin() + static_cast<ptrdiff_t>(kept - 1),
                     ordered.end(), std::greater<float>());
    bound = ordered[kept - 1];
  }
  std::vector<uint64_t> ranks;
  ranks.reserve(4 * kept);
  for (size_t block = 0; block < blocks; ++block) {
    if (maxima[block] < bound) continue;
    const size_t end = std::min(vocab, (block + 1) * kBlock);
    for (size_t id = block * kBlock; id < end; ++id) {
      if (logits[id] >= bound) ranks.push_back(rank(logits[id], id));
    }
  }
  if (ranks.size() < kept) {  // NaN among the logits
    ranks.clear();
    for (size_t id = 0; id < vocab; ++id) ranks.push_back(rank(logits[id], id));
  }
  const auto end = ranks.begin() + static_cast<ptrdiff_t>(kept);
  std::nth_element(ranks.begin(), end - 1, ranks.end(), std::greater<uint64_t>());
  std::sort(ranks.begin(), end, std::greater<uint64_t>());
  for (size_t i = 0; i < kept; ++i) {
    ids[i] = static_cast<int32_t>(id_of(ranks[i]));
    values[i] = logits[ids[i]];
  }
}

void choose_among(const uint32_t* from, const float* logits, size_t count, size_t kept,
                  int32_t* ids, float* values) {
  std::vector<std::pair<uint64_t, float>> ranks(count);
  for (size_t i = 0; i < count; ++i) ranks[i] = {rank(logits[i], from[i]), logits[i]};
  const auto better = [](const auto& a, const auto& b) { return a.first > b.first; };
  std::partial_sort(ranks.begin(), ranks.begin() + static_cast<ptrdiff_t>(kept), ranks.end(),
                    better);
  for (size_t i = 0; i < kept; ++i) {
    ids[i] = static_cast<int32_t>(id_of(ranks[i].first));
    values[i] = ranks[i].second;
  }
}

}  // namespace sk
