// Matrices as the ABI describes them, checked.
#pragma once

#include <cstdint>

#include "error.hpp"
#include "matrix_data.hpp"
#include "sparse_kernels.h"

namespace sk {

int32_t check_range(const char* name, uint64_t value, uint64_t low, uint64_t high);

// What computes with matrices of a model on the CPU, null elsewhere, and what checks them.
struct MatrixKinds {
  const Products *bfloat16, *integers, *prompts;
  bool (*all_finite)(const uint16_t* row, size_t n);
};

// Columns that hold `rank` factors of a low-rank term in codes of so many bits, whole tiles.
uint32_t factor_columns(uint32_t bits, uint32_t rank);

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
