// A decoder as the ABI describes it, checked.
#pragma once

#include <cstdint>
#include <vector>

#include "matrix.hpp"

namespace sk {

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

constexpr uint32_t kMostHeadsOfGroup = 32;  // query heads of a KV head

struct Layer {
  uint32_t heads, kv_heads, neurons, window;
  uint32_t blocks;      // of SK_NEURON_BLOCK neurons
  uint32_t partitions;  // of these, by the library's own choice
  Matrix qkv, output, gate, up, down;
  Matrix qkv_basis, output_basis, gate_up_basis, down_basis;  // of their low-rank terms
  const float *attention_norm, *mlp_norm, *qkv_bias, *output_bias, *down_bias, *q_norm, *k_norm;
  // For choices by planes, if planes_factors is not empty: gate and up by their upper bits.
  Matrix gate_high, up_high;
  // And down with one number for all lower bits, in `middle`, if it is in two planes.
  Matrix down_coarse;
  std::vector<uint8_t> middle;
  std::vector<float> planes_factors, gate_factors;  // [neurons in whole blocks], zeros at the end
  size_t kv_offset;  // bytes from the beginning of KV, for each of its blocks

  // The neurons that a block has, one bit each; of a block beyond the last one none.
  uint64_t members(size_t block) const {
    const size_t first = block * SK_NEURON_BLOCK, left = neurons > first ? neurons - first : 0;
    return left >= SK_NEURON_BLOCK ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  }

  // Blocks of neurons in a partition: [begin(p), begin(p + 1)).
  uint32_t partition_begin(uint32_t partition) const {
    return static_cast<uint32_t>(uint64_t{partition} * blocks / partitions);
  }
};

// What stands in for neurons that a choice leaves out of a layer.
struct Correction {
  uint32_t rank = 0;
  Matrix inputs, outputs;
};

// Vectors stay the caller's, as matrices do.
struct Description {
  uint32_t hidden, columns /* hidden rounded up */, vocab, head_dim, dim /* rounded up */;
  uint32_t widest = 0, most_heads = 0;
  float eps, rope_scale;
  std::vector<float> rope_frequencies;
  uint32_t rope_rows;
  std::vector<Layer> layers;
  std::vector<Correction> corrections;  // [number - 1][layer]
  uint32_t words;                       // of 64 neurons of the widest layer
  const float* norm;
  Matrix embedding, lm_head;
  sk_reduce reduce;
  uint32_t activation_bits, kv_bits;
  size_t kv_bytes;       // of one KV block in all layers
  size_t kv_head_bytes;  // of one head in it
};

int32_t check_vector(const char* name, const float* data, size_t count, bool required);

// Everything but the scan, and what the library sets itself. Throws std::bad_alloc.
int32_t take_description(const sk_model_args& args, const MatrixKinds& kinds, Description* out);

}  // namespace sk
