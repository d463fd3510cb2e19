// Matrices as the ABI describes them, checked.
#pragma once

#include <cstdint>

#include "error.hpp"
#include "kernels.hpp"
#include "sparse_kernels.h"

// Runs check after check until one fails.
#define SK_TRY(expression)                                  \
  do {                                                      \
    if (const int32_t failed = (expression)) return failed; \
  } while (false)

namespace sk {

int32_t check_range(const char* name, uint64_t value, uint64_t low, uint64_t high);

// What computes with matrices of a model.
struct MatrixKinds {
  const Kernels& kernels;
  uint32_t activation_bits;
};

// A matrix in two planes by its upper bits alone, the mean of all lower ones added.
Matrix upper_bits(const Matrix& matrix);

// Of `rows` x `columns`, without a low-rank term; also reads every bfloat16 number and every scale.
int32_t take_matrix(const char* name, const sk_matrix& from, uint64_t rows, uint64_t columns,
                    const MatrixKinds& kinds, Matrix* out);

// The same, of a layer: it may have a low-rank term.
int32_t take_layer_matrix(const char* name, const sk_matrix& from, uint64_t rows, uint64_t columns,
                          const MatrixKinds& kinds, Matrix* out);

// The basis of a low-rank term of `matrix`, if it has one.
int32_t take_basis(const char* name, const sk_matrix& from, const Matrix& matrix, uint64_t columns,
                   const MatrixKinds& kinds, Matrix* out);

}  // namespace sk
