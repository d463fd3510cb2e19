// clang-format off: the order matters
#include "simd_avx2.hpp"
#include "kernels_common.inl"
#include "integer_avx2.inl"
#include "integer_rows.inl"
#include "attention.inl"
#include "attention_bfloat16.inl"
#include "attention_int8.inl"
#include "kernels_fma.inl"
// clang-format on

const sk::Kernels& sk::kernels_avx2() {
  static const Kernels kernels = make_kernels();
  return kernels;
}
