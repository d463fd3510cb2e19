#include "low_rank.hpp"

#include <algorithm>

#include "sparse_kernels.h"

namespace sk {
namespace {

// A factor in two codes of 4 bits is 16 times the first and the second.
constexpr float kUpper = 16;

bool in_halves(const Matrix& matrix) { return matrix.bits + matrix.low_bits == 4; }

}  // namespace

void put_factor_inputs(const Matrix& matrix, const float* u, size_t n, float* inputs) {
  std::fill(inputs + n, inputs + matrix.factors, 0.0f);
  float* to = inputs + matrix.factors;
  if (!in_halves(matrix)) {
    std::fill(std::copy_n(u, matrix.rank, to), inputs + matrix.columns, 0.0f);
    return;
  }
  for (size_t begin = 0; begin < matrix.rank; begin += SK_RANK_TILE, to += 2 * SK_RANK_TILE) {
    for (size_t i = 0; i < SK_RANK_TILE; ++i) {
      to[i] = kUpper * u[begin + i];
      to[SK_RANK_TILE + i] = u[begin + i];
    }
  }
}

void take_factor_outputs(const Matrix& matrix, const float* outputs, float* z) {
  const float* from = outputs + matrix.factors;
  if (!in_halves(matrix)) {
    std::copy_n(from, matrix.rank, z);
    return;
  }
  for (size_t begin = 0; begin < matrix.rank; begin += SK_RANK_TILE, from += 2 * SK_RANK_TILE) {
    for (size_t i = 0; i < SK_RANK_TILE; ++i) {
      z[begin + i] = kUpper * from[i] + from[SK_RANK_TILE + i];
    }
  }
}

}  // namespace sk
