// clang-format off: the order matters
#include "simd_avx512.hpp"
#include "integer_avx512.inl"
#include "integer_rows.inl"
// clang-format on

sk::Products sk::integer_amx(bool bytes) {
  return bytes ? integer::products<8>() : integer::products<16>();
}
