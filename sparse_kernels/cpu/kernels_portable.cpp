// clang-format off: the order matters
#include "simd_portable.hpp"
#include "kernels_common.inl"
#include "integer_portable.inl"
#include "integer_rows.inl"
#include "attention.inl"
#include "attention_bfloat16.inl"
#include "attention_int8.inl"
#include "kernels_fma.inl"
// clang-format on

const sk::Kernels& sk::kernels_portable() {
  static const Kernels kernels = make_kernels();
  return kernels;
}
