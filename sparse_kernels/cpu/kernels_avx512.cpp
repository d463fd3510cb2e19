// clang-format off: the order matters
#include "simd_avx512.hpp"
#include "kernels_common.inl"
#include "integer_avx512.inl"
namespace {
typedef VectorIntegers Integers;
}
#include "integer_rows.inl"
#include "integer_pairs.inl"
#include "attention.inl"
#include "attention_bfloat16.inl"
#include "attention_int8.inl"
#include "kernels_fma.inl"
// clang-format on

const sk::Kernels& sk::kernels_avx512() {
  static const Kernels kernels = [] {
    Kernels made = make_kernels();
    made.integer16.dot = integer::dot_few<16>;
    made.integer16.dot_chosen = integer::dot_chosen_few<16>;
    made.integer8.dot = integer::dot_few<8>;
    made.integer8.dot_chosen = integer::dot_chosen_few<8>;
    return made;
  }();
  return kernels;
}
