#include "read_sum.hpp"

namespace sk {

uint64_t read_sum_portable(const void* data, size_t bytes) {
  const uint64_t* words = static_cast<const uint64_t*>(data);
  const uint64_t* const end = words + bytes / sizeof(uint64_t);
  uint64_t sums[8] = {};
  for (; words != end; words += 8) {
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace sk
