// The arithmetic of a forward, once for each level of the instruction set. Included by sources with
// instruction-set flags, so it must stay free of inline code (CMakeLists.txt says why).
//
// The numerics are a contract: what is computed for one token never depends on the other tokens of
// a call, nor on how rows, columns, positions or blocks are shared out between calls.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "matrix_data.hpp"

namespace sk {

// Rows that will be read soon, which a product fetches bit by bit while it computes: some rows side
// by side, a line of each at a time, so that each row is a stream to the CPU's own prefetching.
struct Fetch {
  struct Rows {
    const uint8_t* at[16];  // the last one again where there are fewer
    uint32_t bytes;         // of a row
  };
  Rows rows[160];
  uint32_t count, next;  // of `rows`
  uint32_t byte;         // to be fetched next of each of them
  uint32_t step;         // lines of all rows side by side to fetch at a time
};

// The neurons of a block of 64, one bit each.
typedef uint64_t BlockMask;
constexpr BlockMask kWholeBlock = ~BlockMask{0};

// Some rows of a few blocks, from row `first` on.
constexpr size_t kChosenBlocks = 4;
constexpr size_t kMostChosen = kChosenBlocks * 64;
struct ChosenRows {
  BlockMask masks[kChosenBlocks];
  size_t first, blocks;
  size_t count;  // in all masks
  uint32_t at[kMostChosen];
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
  uint32_t seen_end;           // positions that are seen end here; those after `end` are read next
  const int32_t* block_table;  // of the sequence
  const uint8_t* kv;           // this layer's block 0, this head
  size_t block_stride;         // bytes from a block to the next
  float* largest;              // [rows] out: of the scores; -inf where a row sees nothing
  float* total;                // [rows] out: sum of exp(score - largest)
  float* values;               // [rows, dim] out: sum of exp(score - largest) * value
};
constexpr uint32_t kMaxHeadDim = 1024;
constexpr size_t kMaxDownNeurons = 512;  // in one call of `down`
constexpr size_t kMaxChoiceTokens = 16;  // in one call of `dot_chosen`
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

// One block of 64 neurons.
struct SwigluTask {
  const Matrix* down;            // the matrix that the activations are for
  const float *gate, *up;        // [tokens, stride]
  size_t stride, tokens, first;  // neuron
  size_t neurons;                // in a row of activations
  const BlockMask* used;         // null, or [tokens]: the others' activations are zero
  void* activations;
  float* plain;  // null, or [tokens, plain_stride]: gets the activations too
  size_t plain_stride;
};

// A token's choice among a block of neurons; see sk_choice_kind.
struct ChooseTask {
  const float *gate, *up;                    // [64]; up null: by gate
  const float* factors;                      // [64]
  const float *gate_variance, *up_variance;  // [64], with up
  const float* bounds;                       // [3]
};
struct Chosen {
  BlockMask used, whole, down_whole;
};

// A partition of the neurons, some columns of the down product.
struct DownTask {
  const Matrix* weights;
  size_t neurons;                    // in a row of activations
  size_t first_neuron, last_neuron;  // multiples of 64, at most kMaxDownNeurons between
  // Null, or of each block in between the neurons that some token uses: the others are not read,
  // and all their activations are zero.
  const BlockMask* used;
  // With it, null, or the matrix with one number for all lower bits, and of each block and token
  // [tokens] the neurons that it uses so; `used` are then those that are used otherwise.
  const Matrix* coarse;
  const BlockMask* by_coarse;
  // Null: a neuron's row is its number. Else, of each block in between, the row of the first neuron
  // that is used; those of the others follow it.
  const uint32_t* places;
  Fetch* fetch;                  // null, or what is read next
  size_t first_column, columns;  // multiples of 64
  const void* activations;
  size_t tokens;
  float* out;  // [tokens, out_stride], of the first column
  size_t out_stride;
  bool add;  // to what is there
};

// The products with matrices of one kind. All sizes are checked by the caller; rows are a multiple
// of 16.
struct Products {
  // The inputs of dot products with a matrix, `tokens` vectors, in the form that `dot` takes. The
  // vector has n numbers, those up to the matrix's columns are zero.
  size_t (*operand_bytes)(const Matrix* weights, size_t tokens);
  void (*store_operand)(const Matrix* weights, const float* x, size_t n, size_t token,
                        size_t tokens, void* operand);
  // out[token * out_stride + i] = <row first_row + i of the weights, token's input>.
  void (*dot)(const Matrix* weights, size_t first_row, size_t rows, const void* operand,
              size_t tokens, float* out, size_t out_stride);
  // The same for some rows, and at most kMaxChoiceTokens: out[token * out_stride + i] for row
  // first + i.
  void (*dot_chosen)(const Matrix* weights, const ChosenRows* chosen, const void* operand,
                     size_t tokens, float* out, size_t out_stride, Fetch* fetch);

  // Activations silu(gate) * up of the neurons, in the form that `down` takes.
  size_t (*activation_bytes)(size_t tokens, size_t neurons);
  void (*swiglu)(const SwigluTask* task);
  // out[t, c] (+)= the sum over neurons [first_neuron, last_neuron) of activation * weights[n, c],
  // in the order of the neurons, from zero.
  void (*down)(const DownTask* task);
};

// How keys and values of 16 positions stand in a KV block of one head, and attention over them.
// What is stored for a token depends on that token alone.
struct KvFormat {
  void (*append_key)(const float* key, size_t dim, size_t offset, uint8_t* block);
  void (*append_value)(const float* value, size_t dim, size_t offset, uint8_t* block);
  void (*attend)(const AttentionChunk* chunk);
};

struct Kernels {
  void (*begin_thread)();  // around the work of a thread
  void (*end_thread)();
  Products bfloat16, integer16, integer8;  // integers with activations of 16 or 8 bits
  Products prompts;  // integers with prompts, if `has_prompts`: faster, and rounded otherwise
  bool has_prompts;
  KvFormat kv_bfloat16, kv_int8;

  // x / rms(x) * weight
  void (*rms_norm)(const float* x, const float* weight, size_t n, float eps, float* out);
  // out[i] = the sum of rows[0][i], rows[1][i], ... in this order; n is a multiple of 32.
  void (*sum_rows)(const float* rows, size_t stride, size_t count, size_t n, float* out);

  void (*finish_heads)(const HeadTask* task);

  void (*choose)(const ChooseTask* task, Chosen* chosen);
  // out[c] += z[0] rows[0][c] + z[1] rows[1][c] + ..., in this order, of a matrix in bfloat16.
  void (*add_rows)(const Matrix* rows, const float* z, size_t count, float* out);
  // The sum of squares of each group of x [n].
  void (*group_squares)(const float* x, size_t n, size_t group, float* out);
  // Of 64 rows of a matrix by its upper bits: what the lower ones make of its product with an input
  // whose groups have these squares, as a variance.
  void (*variance)(const Matrix* high, size_t first_row, const float* squares, float* out);

  float (*sum_of_squares)(const float* a, size_t n);
  // Norm scores of at most 16 tokens' activations [n]: sums[i] += 2^32 a_i^2 / (sum of squares),
  // rounded. `a` [tokens, stride] can be read up to a whole vector.
  void (*add_norm_scores)(const float* a, size_t stride, size_t tokens, size_t n, int64_t* sums);

  void (*embed)(const void* row, size_t n, float* out);
  float (*largest)(const float* x, size_t n);
  // Sum of exp((x - largest) * factor), in double.
  double (*sum_of_exp)(const float* x, size_t n, float largest, float factor);
  // The places i of values[i] + a along[i] + b across[i] >= bound, or not a number, in order ->
  // their count.
  size_t (*within_reach)(const float* values, const float* along, const float* across, size_t n,
                         float a, float b, float bound, uint32_t* places);
  bool (*all_finite)(const uint16_t* row, size_t n);
};

const Kernels& kernels_portable();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_amx();
// With activations of 16 bits, or of 8.
Products integer_amx(bool bytes);
Products prompt_amx();

}  // namespace sk
