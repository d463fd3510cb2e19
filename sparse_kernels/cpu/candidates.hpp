// The likeliest tokens of a row of logits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace sk {

// The `kept` largest of logits [vocab], by (logit descending, id ascending); NaN comes last.
void choose_candidates(const Kernels& kernels, const float* logits, size_t vocab, size_t kept,
                       int32_t* ids, float* values);

// The `kept` largest of `count` logits whose ids are given, in the same order.
void choose_among(const uint32_t* from, const float* logits, size_t count, size_t kept,
                  int32_t* ids, float* values);

}  // namespace sk
