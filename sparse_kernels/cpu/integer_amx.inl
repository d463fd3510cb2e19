// What integer.inl needs of this level: the down product of more than a few tokens is one of tiles.
#include "integer_avx512.inl"

namespace {

struct Integers : VectorIntegers {
  template <int kBits>
  static void add_columns(const uint8_t* codes, size_t columns, size_t first, size_t n,
                          size_t neurons, const Activations& activations, size_t tokens,
                          const float* factors, float* sums);
};

}  // namespace
