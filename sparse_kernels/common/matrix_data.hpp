// A weight matrix as the library sees it. Included by sources with instruction-set flags, so it
// must stay free of inline code (CMakeLists.txt says why).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sk {

struct Products;

// A weight matrix: bfloat16, or codes with a scale and a zero for each group of columns.
struct Matrix {
  const Products* products;   // what computes with it on the CPU
  const Products* prompts;    // and with the tokens of prompts
  const uint8_t* codes;       // all bits of its elements, or the upper ones
  const uint8_t* low;         // the lower bits, or null
  size_t stride, low_stride;  // bytes from a row to the next
  uint32_t bits, low_bits;    // of `codes` and of `low`
  uint32_t columns;           // multiple of 64
  uint32_t rank, factors;     // of a low-rank term, and the column where its factors begin
  uint32_t group,
      groups;  // columns with one scale (the last group may have fewer); groups of a row
  const uint16_t* scales;  // float16 [rows / 16][groups][16]
  const uint8_t* zeros;    // the same shape
  // What a code stands for: element = scale * (unit * code + middle - zero). Where `codes` are only
  // the upper bits, `unit` is 2^bits of the others and `middle` the mean of these.
  float unit, middle;
};

}  // namespace sk
