// The arithmetic of a forward, once for each level of the instruction set. Included by sources with
// instruction-set flags, so it must stay free of inline code (CMakeLists.txt says why).
//
// The numerics are a contract: what is computed for one token never depends on the other tokens of
// a call, nor on how rows, columns, positions or blocks are shared out between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sk {

// A weight matrix in bfloat16.
struct Rows {
  const uint16_t* data;  // the first row
  size_t stride;         // elements from a row to the next
};

// What some queries of one sequence see of one KV head in positions [begin, end), which lie in one
// chunk. Row i sees positions [first[i], last[i]].
struct AttentionChunk {
  const float* queries;        // [rows, dim], scaled
  uint32_t rows;               // 1 .. kAttentionRows
  uint32_t dim;                // a multiple of 16
  const int32_t* first;        // [rows]
  const int32_t* last;         // [rows]
  uint32_t begin;              // a multiple of kAttentionChunk
  uint32_t end;                // at most begin + kAttentionChunk; nobody sees more
  const int32_t* block_table;  // of the sequence
  const uint16_t* kv;          // this layer's block 0, this head
  size_t block_stride;         // elements from a block to the next
  float* largest;              // [rows] out: of the scores; -inf where a row sees nothing
  float* total;                // [rows] out: sum of exp(score - largest)
  float* values;               // [rows, dim] out: sum of exp(score - largest) * value
};
constexpr size_t kMaxDownBlocks = 16;  // of neurons in one call of `down`
constexpr uint32_t kAttentionRows = 32;
constexpr uint32_t kAttentionChunk = 128;  // positions; partial results of chunks merge in order

// One head of q, k or v for some tokens, after the projection.
struct HeadTask {
  float* heads;  // [tokens, stride], changed
  size_t stride;
  uint32_t tokens;
  uint32_t head_dim;
  const float* bias;  // [dim] or null
  const float* norm;  // [head_dim] or null: RMSNorm of the head
  float eps;
  const float* cos;  // [tokens, head_dim / 2], null: no rotation
  const float* sin;
  float scale;  // of the result
};

// A partition of the neurons, some columns of the down product.
struct DownTask {
  Rows weights;
  size_t neurons;                  // in a row of activations
  size_t first_block, last_block;  // of 32 neurons, at most kMaxDownBlocks
  size_t first_column, columns;    // multiples of 32
  const void* activations;
  size_t tokens;
  float* out;  // [tokens, out_stride], of the first column
  size_t out_stride;
  bool add;  // to what is there
};

// All sizes are checked by the caller. `k` is a multiple of 32, `rows` of 16, `columns` of 32.
struct Kernels {
  void (*begin_thread)();  // around the work of a thread
  void (*end_thread)();

  // The inputs of dot products, `tokens` vectors of `k` numbers, in the form that `dot` takes.
  size_t (*operand_bytes)(size_t tokens, size_t k);
  void (*store_operand)(const float* x, size_t n, size_t k, size_t token, void* operand);
  // x / rms(x) * weight
  void (*rms_norm)(const float* x, const float* weight, size_t n, float eps, float* out);
  // out[token * out_stride + row] = <weights row, token's input>.
  void (*dot)(Rows weights, size_t rows, size_t k, const void* operand, size_t tokens, float* out,
              size_t out_stride);

  // Activations silu(gate) * up of the neurons, in the form that `down` takes.
  size_t (*activation_bytes)(size_t tokens, size_t neurons);
  // One block of 32 neurons: gate, up [tokens, stride]; `plain` null or [tokens, plain_stride] gets
  // the activations too.
  void (*swiglu)(const float* gate, const float* up, size_t stride, size_t tokens, size_t block,
                 size_t neurons, void* activations, float* plain, size_t plain_stride);
  // out[t, c] (+)= the sum over neurons [32 first_block, 32 last_block) of activation * weights[n,
  // c], in the order of the neurons, from zero. `weights` begins at neuron 0.
  void (*down)(const DownTask* task);

  // out[i] = the sum of rows[0][i], rows[1][i], ... in this order; n is a multiple of 32.
  void (*sum_rows)(const float* rows, size_t stride, size_t count, size_t n, float* out);

  void (*finish_heads)(const HeadTask* task);
  void (*append_key)(const float* key, size_t dim, size_t offset, uint16_t* block);
  void (*append_value)(const float* value, size_t dim, size_t offset, uint16_t* block);
  void (*attend)(const AttentionChunk* chunk);

  // Norm score of one token's activations [n]: sums[i] += round(2^32 a_i^2 / total).
  double (*sum_of_squares)(const float* a, size_t n);
  void (*add_norm_scores)(const float* a, size_t n, double total, int64_t* sums);

  void (*embed)(const uint16_t* row, size_t n, float* out);
  float (*largest)(const float* x, size_t n);
  // Sum of exp((x - largest) * factor), in double.
  double (*sum_of_exp)(const float* x, size_t n, float largest, float factor);
  bool (*all_finite)(const uint16_t* row, size_t n);
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_amx();

}  // namespace sk
