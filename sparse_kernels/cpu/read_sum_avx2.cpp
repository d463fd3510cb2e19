#include <immintrin.h>

#include "read_sum.hpp"

namespace sk {

uint64_t read_sum_avx2(const void* data, size_t bytes) {
  const __m256i* vectors = static_cast<const __m256i*>(data);
  const __m256i* const end = vectors + bytes / sizeof(__m256i);
  __m256i sums[8];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (; vectors != end; vectors += 8) {
    for (int i = 0; i < 8; ++i) {
      sums[i] = _mm256_add_epi64(sums[i], _mm256_load_si256(vectors + i));
    }
  }
  for (int i = 1; i < 8; ++i) sums[0] = _mm256_add_epi64(sums[0], sums[i]);
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[0]);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

}  // namespace sk
