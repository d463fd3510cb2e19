// Low-rank terms of integer matrices, W + B A: B is in further columns of W, which the products
// take for any others. See sk_matrix.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace sk {

// With u = A x [rank]: the rest of a row of inputs [matrix.columns], beyond its n numbers.
void put_factor_inputs(const Matrix& matrix, const float* u, size_t n, float* inputs);

// The outputs of the further columns of a down product's row, as z [rank].
void take_factor_outputs(const Matrix& matrix, const float* outputs, float* z);

}  // namespace sk
