// The LM head.
#pragma once

#include <cstddef>

#include "model.hpp"

namespace sk {

constexpr size_t kHeadRows = 256;  // of the LM head in a unit of work

inline size_t head_units(const Model& model) { return (model.vocab + kHeadRows - 1) / kHeadRows; }

// The rows of a unit of `matrix`, the LM head or its scan, for `count` inputs -> logits [count,
// vocab]; `scratch` [count, kHeadRows].
void head_rows(const Model& model, const Matrix& matrix, const void* operand, size_t count,
               size_t unit, float* scratch, float* logits);

// hidden [rows, hidden] -> logits [rows, vocab], on all threads. Throws std::bad_alloc.
void run_head(Model& model, const sk_logits_args& args);

}  // namespace sk
