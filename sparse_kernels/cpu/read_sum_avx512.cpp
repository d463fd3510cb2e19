#include <immintrin.h>

#include "read_sum.hpp"

namespace sk {

uint64_t read_sum_avx512(const void* data, size_t bytes) {
  const __m512i* vectors = static_cast<const __m512i*>(data);
  const __m512i* const end = vectors + bytes / sizeof(__m512i);
  __m512i sums[8];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (; vectors != end; vectors += 8) {
    for (int i = 0; i < 8; ++i) {
      sums[i] = _mm512_add_epi64(sums[i], _mm512_load_si512(vectors + i));
    }
  }
  for (int i = 1; i < 8; ++i) sums[0] = _mm512_add_epi64(sums[0], sums[i]);
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, sums[0]);
  uint64_t total = 0;
  for (uint64_t lane : lanes) total += lane;
  return total;
}

}  // namespace sk
