// What kernels are given: plain structs, alike for the host's compiler and the device's. All
// pointers are of the device. Rows of the batch are its tokens; a kernel is given some of them,
// from `first_row` on.
#pragma once

#if !defined(__CUDACC_RTC__)
#include <stdint.h>
#endif

namespace sk {
namespace cuda {

// Of every block of every kernel; kernels say how many blocks they want.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

constexpr uint32_t kTokensOfTile = 4;     // of a tile of 8 columns of a product: two of each token
constexpr uint32_t kNeuronBlock = 64;     // SK_NEURON_BLOCK
constexpr uint32_t kBlockPositions = 16;  // SK_BLOCK_SIZE
constexpr uint32_t kChunk = 128;          // positions of attention whose results are added in order
constexpr uint32_t kChoosingTokens = 16;  // SK_CHOICE_TOKENS
constexpr uint32_t kMostRank = 512;       // SK_MAX_RANK
constexpr uint32_t kMostCorrectionRank = 64;
constexpr uint32_t kMostCandidates = 256;  // SK_NUM_CANDIDATES

// A weight matrix. Elements are as in sk_plane, row after row; scales and zeros by row, [rows,
// groups].
struct Weights {
  const uint8_t* codes;         // bfloat16, or all bits of the codes, or the upper ones
  const uint8_t* low;           // the lower ones, or null
  uint64_t stride, low_stride;  // bytes from a row to the next, multiples of 16
  uint32_t bits, low_bits;
  uint32_t rows;     // stored: whole tiles of 16
  uint32_t columns;  // stored: whole tiles of 64, those of a low-rank term among them
  uint32_t group, groups;
  const uint16_t* scales;  // float16
  const uint8_t* zeros;
  const float* most;       // [rows] a row's largest scale; of down alone
  uint32_t rank, factors;  // of a low-rank term, and the column where its factors begin
};

// The inputs of dot products, one for each row of the batch:
//
// - with bfloat16 weights x is the sum of two bfloat16 numbers: rows 2 r and 2 r + 1 of `halves`;
// - with integers, of each group of columns, x = scale (256 upper + lower), signed bytes in rows 2
// r and
//   2 r + 1; with activations of 8 bits upper is 0. offsets = scale times the sum of a group's
//   integers.
//
// integer.inl of the CPU says how x is rounded.
struct Operand {
  uint8_t* halves;  // [2 rows, stride]
  uint64_t stride;  // bytes
  float* scales;    // [rows, groups]
  float* offsets;   // [rows, groups]
  uint32_t groups;
};

struct Token {
  int32_t id;
  uint32_t position;
  uint32_t sequence;
  uint32_t sequence_row;  // the first row of its sequence in the whole batch
};

// A sequence's choice of neurons; see sk_choice.
struct Choice {
  uint32_t kind, correction;
  const uint64_t* core;     // null, or [layers, words]
  const float* thresholds;  // null, or [layers, 3]
  uint32_t choosing;        // 0: all neurons, and the rest is nothing
  uint32_t reserved;
};

// --- embed: a block for each row.
struct EmbedArgs {
  const Token* tokens;  // [rows]
  const uint8_t* embedding;
  uint64_t embedding_stride;
  float* x;  // [rows, hidden]
  uint32_t rows, hidden;
  const float* frequencies;  // [rope_rows, head_dim / 2]
  uint32_t rope_rows, half;  // head_dim / 2
  float rope_scale;
  float *cos, *sin;  // [rows, half]
};

// --- prepare: a block for each row. The row's vector v [size] comes from one of three places; then
// it is normed, and becomes the row of an operand.
enum Source : uint32_t {
  kFromResidual = 0,   // v = x
  kFromParts = 1,      // x += the sum of parts, in order, and what low-rank terms add; v = x
  kFromAttention = 2,  // v = chunks of attention, merged in order
};
struct PrepareArgs {
  uint32_t source, rows;
  uint32_t size;             // numbers of v: hidden, or heads * head_dim
  uint32_t x_stride;         // of x
  float* x;                  // [.., x_stride]
  const uint32_t* row_list;  // null, or [rows] which rows of x; the operand's stay 0, 1, …
  // kFromParts: parts [num_parts][rows][parts_stride], the first `size` columns of the residual;
  // from `factors` on, where rank is not 0, the outputs of down's low-rank term, see sk_matrix.
  const float* parts;
  uint32_t num_parts, parts_stride;
  uint32_t down_rank, down_factors,
      down_halves;            // down_halves: 1 where its codes have 4 bits in all
  const uint8_t* down_basis;  // bfloat16 [down_rank, hidden]
  uint64_t down_basis_stride;
  const float* down_bias;  // null, or [size] which is added to them
  // and corrections: of each row, z [rows, kMostCorrectionRank] times the outputs.
  const struct CorrectionArgs* corrections;  // null: none
  // kFromAttention: see AttendArgs.
  const Token* tokens;
  const float *chunk_values, *chunk_largest, *chunk_total;
  uint32_t heads, head_dim, dim, most_chunks, window;
  // RMSNorm: null, none.
  const float* norm;
  float eps;
  float*
      normed;  // [rows, normed_stride] v after it, always written; normed_stride >= operand columns
  uint32_t normed_stride;
  // The operand, for a matrix with these; columns 0: none is made.
  Operand operand;
  uint32_t columns, group, groups, activation_bits;  // group 0: bfloat16
  uint32_t rank, factors, halves;                    // of its low-rank term
  const uint8_t* basis;                              // bfloat16 [rank, size]
  uint64_t basis_stride;
  float* squares;  // null, or [rows, groups] sums of squares of each group of inputs
};

// Of a layer: the corrections that sequences may ask for.
struct Correction {
  uint32_t rank;                    // 0: none
  const uint8_t *inputs, *outputs;  // bfloat16 [kMostCorrectionRank, hidden]
  uint64_t inputs_stride, outputs_stride;
};
struct CorrectionArgs {
  const Correction* of_number;  // [num_corrections] of this layer, the first is number 1
  const Token* tokens;
  const Choice* choices;  // by sequence
  float* z;               // [rows, kMostCorrectionRank]
  const float* normed;    // [rows, normed_stride] inputs of gate and up
  uint32_t normed_stride, hidden, rows;
};
// --- correct: a block for each row; z = inputs normed.
// (arguments: CorrectionArgs)

// --- dot: out[row, i] = <row i of the weights, the row's operand>; blocks [weights.rows / 16, rows
// / (4 tiles) rounded up]. The kernels dot_FORMAT_TILES take 4 * TILES rows of the batch at once.
struct DotArgs {
  Weights weights;
  Operand operand;
  uint32_t rows;   // of the batch
  uint32_t valid;  // weights' rows that are written; others are padding
  float* out;      // [rows, out_stride]
  uint32_t out_stride;
  uint32_t add;       // 1: to what is there, with the bias
  const float* bias;  // null, or [valid]; with `add` alone
};

// --- finish_heads: blocks [heads + 2 KV heads, rows / kWarps rounded up]; a warp for a head of a
// row.
struct HeadsArgs {
  const Token* tokens;
  const float* projected;                         // [rows, (heads + 2 kv_heads) dim], q, k, v
  uint32_t rows, heads, kv_heads, head_dim, dim;  // dim: head_dim in whole tiles
  const float *bias, *q_norm, *k_norm;            // null: none. bias [(heads + 2 kv_heads) dim]
  float eps, scale;                               // of queries
  const float *cos, *sin;                         // [rows, head_dim / 2]
  float* queries;                                 // [rows, heads, dim], scaled
  const int32_t* block_tables;
  const uint32_t* table_begin;  // [sequences]
  uint8_t* kv;                  // this layer's block 0
  uint64_t kv_head_bytes;       // of a head of a block; a block has kv_heads of them
  uint32_t kv_bits;
};

// --- attend: blocks [most_chunks, kv_heads, rows]: the heads of a row that share a KV head, one
// chunk of positions. Chunks are counted from the first that the row sees: chunk i has the
// positions from kChunk (first / kChunk + i) on. Blocks beyond a row's own chunks do nothing.
struct AttendArgs {
  const Token* tokens;
  const float* queries;  // [rows, heads, dim]
  uint32_t rows, heads, kv_heads, dim, window, most_chunks;
  const int32_t* block_tables;
  const uint32_t* table_begin;
  const uint8_t* kv;
  uint64_t kv_head_bytes;
  uint32_t kv_bits;
  float* chunk_values;   // [rows, heads, most_chunks, dim] sum of exp(score - largest) value
  float* chunk_largest;  // [rows, heads, most_chunks]
  float* chunk_total;    // [rows, heads, most_chunks] sum of exp(score - largest)
};

// Which neurons tokens look at, use, read whole, and of down: [kind][row][neurons / 16], a bit
// each; then the same of all rows together, as one more row. Kinds as in `reads` of sk_sequence.
constexpr uint32_t kReadKinds = 4;

// --- activate: silu(gate) up; blocks [neurons / 16, rows / (4 tiles) rounded up], where rows
// choose their neurons at most kChoosingTokens and one tile of blocks. See sk_choice and choice.cpp
// of the CPU.
struct ActivateArgs {
  Weights gate, up;  // of one format
  Operand operand;
  uint32_t rows, neurons;  // neurons: the true ones; the weights' rows are more
  float* activations;      // [rows, neurons in whole blocks]; zero for what is not used
  uint32_t stride;         // of a row of them
  // Null where no row chooses.
  const Choice* choices;
  const Token* tokens;
  uint32_t layer, words;
  const float *planes_factors, *gate_factors;  // [neurons in whole blocks], or null
  const float* squares;                        // [rows, groups], with planes
  uint32_t down_planes;  // 1: down is in two planes, and is read whole where the choice says so
  uint16_t* masks;       // [kReadKinds][rows + 1][stride / 16]
};

// --- down: parts[slice][row][column] of the down product; blocks [weights.columns / 64, slices,
// rows / (4 tiles) rounded up]. A slice has whole blocks of neurons, [blocks i / slices, blocks (i
// + 1) / slices), and sums do not depend on which neurons other rows use.
struct DownArgs {
  Weights weights;  // rows are neurons
  const float* activations;
  uint32_t rows, stride, blocks, slices;
  const uint16_t* masks;  // null: all neurons; else as `masks` above
  float* parts;
  uint32_t parts_stride, activation_bits;
};

// --- count_reads: one block; popcounts of the masks.
struct CountArgs {
  const uint16_t* masks;
  const Token* tokens;
  uint32_t rows, words;  // words of 16 neurons
  uint64_t* reads;       // [sequences + 1][layers][kReadKinds], the last of all together; set
  uint32_t sequences, layers, layer;
};

constexpr uint32_t kScoreNorm = 0;  // sk_score
constexpr uint32_t kScoreSignedCount = 2;

// --- statistics: a block for each StatisticsUnit; scores are added to sums, as integers.
struct StatisticsUnit {
  uint32_t row, count, score, reserved;
  float share;
  uint32_t reserved2;
  int64_t* sums;  // [layers, widest]
};
struct StatisticsArgs {
  const StatisticsUnit* units;
  uint32_t num_units, neurons, stride, widest, layer;
  const float* activations;
};

// --- candidates: a block for each output row; see sk_forward_args.
struct CandidatesArgs {
  const float* logits;  // [rows, vocab]
  uint32_t rows, vocab, kept;
  const float* temperatures;
  int32_t* ids;   // [rows, kept]
  float* values;  // [rows, kept]
  float *log_normalizers, *log_normalizers_1;
};

// --- copy_rows: a block for each row; to[i] = from[row_list[i]].
struct CopyArgs {
  const float* from;
  const uint32_t* row_list;
  float* to;
  uint32_t rows, size;
};

}  // namespace cuda
}  // namespace sk
