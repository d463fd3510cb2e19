/* The C ABI of the native libraries of sparse_kernels: one that computes on the CPU, one that
 * computes on an NVIDIA GPU. sk_cpu_features and sk_read_probe are of the first alone, sk_device_
 * of the second.
 *
 * Conventions, for every function and struct:
 *
 * - A struct begins with `uint32_t abi_version; uint32_t struct_size;`. The caller sets both, to
 *   SK_ABI_VERSION and sizeof(the struct), in arguments and in results: a result that is smaller
 *   than the library believes must not be written to. Both must match exactly.
 * - A function returns an sk_status as int32_t. Unless it is SK_STATUS_OK the results are
 *   unchanged and sk_last_error() says what was wrong, naming the value and its limit.
 * - Every size, count and pointer that comes in is checked. Sizes are in bytes, times in seconds,
 *   rates in GB/s = 1e9 bytes a second.
 * - No C++ exception leaves the library. All functions may be called from several threads at once.
 * - SK_ABI_VERSION grows with every change that a caller compiled earlier would notice.
 *
 * tools/generate_abi.py reads this file and writes the ctypes mirror (sparse_kernels/_abi.py) and
 * the layout table (common/struct_layout.inc). It understands integer #defines, named enums,
 * structs of fixed-width numbers, arrays and pointers, and SK_API functions; it refuses everything
 * else.
 */
#ifndef SPARSE_KERNELS_H_
#define SPARSE_KERNELS_H_

#include <stdint.h>

#define SK_API __attribute__((visibility("default")))

#define SK_ABI_VERSION 9

#define SK_MAX_THREADS 1024
/* A buffer smaller than this for each thread is refused; it is also the unit of its division. */
#define SK_READ_PROBE_BLOCK_BYTES 65536
#define SK_READ_PROBE_MAX_BUFFER_BYTES 1099511627776
#define SK_READ_PROBE_DEFAULT_PASS_BYTES 67108864
#define SK_READ_PROBE_MAX_PASSES 1048576
#define SK_READ_PROBE_MAX_SECONDS 600

#define SK_BLOCK_SIZE 16      /* positions in a KV block */
#define SK_NUM_CANDIDATES 256 /* likeliest tokens of a row, or the whole vocabulary if smaller */
#define SK_NEURON_BLOCK 64    /* neurons that are added up together in the down product */
#define SK_PARTITIONS 16      /* of the neurons, at least; their sums are added in order */
#define SK_CHOICE_TOKENS 16   /* of a forward in which a sequence chooses its neurons, at most */
#define SK_MAX_CORRECTION_RANK 64
#define SK_MAX_CORRECTIONS 64
#define SK_ROW_TILE 16    /* rows of a matrix are stored in whole tiles */
#define SK_COLUMN_TILE 64 /* and its columns */
#define SK_RANK_TILE 32   /* the rank of a matrix's low-rank term is a multiple of it */
#define SK_MAX_RANK 512
#define SK_ALIGNMENT 64        /* of the first byte and of the row stride of a matrix, and of KV */
#define SK_SCAN_DIRECTIONS 128 /* of inputs, along which a scan's errors are made small */
#define SK_SCAN_NEEDED 48      /* candidates of all rows together that a scan is tried for */
#define SK_MAX_LAYERS 4096
#define SK_MAX_HEADS 4096
#define SK_MAX_HEAD_DIM 1024
#define SK_MAX_DIM 1048576 /* hidden_size, intermediate_size */
#define SK_MAX_VOCAB 4194304
#define SK_MAX_TOKENS 65536 /* of a forward */
#define SK_MAX_POSITIONS 1073741824
#define SK_NUM_PHASES 6
#define SK_LEFT_LOGITS 64 /* rows of logits that a GPU can keep */

#ifdef __cplusplus
extern "C" {
#endif

enum sk_status {
  SK_STATUS_OK = 0,
  SK_STATUS_ABI_MISMATCH = 1, /* abi_version or struct_size is not this library's */
  SK_STATUS_BAD_SIZE = 2,     /* a size or count outside its limits */
  SK_STATUS_BAD_VALUE = 3,    /* any other value outside its limits */
  SK_STATUS_NULL_POINTER = 4,
  SK_STATUS_OUT_OF_MEMORY = 5, /* memory, or threads */
  SK_STATUS_UNSUPPORTED = 6,   /* this CPU or this build cannot do it */
  SK_STATUS_INTERNAL = 7,      /* a defect of the library */
  SK_STATUS_DEVICE = 8         /* the device failed: nothing on it can be used any more */
};

/* Levels of the instruction set that kernels exist for, in ascending order. */
enum sk_isa {
  SK_ISA_AUTO = 0, /* the level that the environment variable SPARSE_KERNELS_ISA names
                      (portable, avx2, avx512, amx; read once), else the CPU's highest */
  SK_ISA_PORTABLE = 1,
  SK_ISA_AVX2 = 2,   /* with FMA and F16C */
  SK_ISA_AVX512 = 3, /* F, BW, DQ, VL, VNNI */
  SK_ISA_AMX = 4,    /* AVX-512 and the BF16 and INT8 tiles of AMX */
  SK_ISA_CUDA = 5    /* what a model on a GPU has; no level of a CPU */
};

/* What the CPU has and the operating system lets programs use.
 * AMX needs one thing more: each process asks for its registers (arch_prctl ARCH_REQ_XCOMP_PERM).
 */
enum sk_cpu_flag {
  SK_CPU_AVX2 = 1,
  SK_CPU_FMA = 2,
  SK_CPU_F16C = 4,
  SK_CPU_AVX512F = 8,
  SK_CPU_AVX512BW = 16,
  SK_CPU_AVX512DQ = 32,
  SK_CPU_AVX512VL = 64,
  SK_CPU_AVX512VNNI = 128,
  SK_CPU_AVX512BF16 = 256,
  SK_CPU_AMX_INT8 = 512,
  SK_CPU_AMX_BF16 = 1024,
  SK_CPU_AVX512VBMI2 = 2048
};

struct sk_cpu_info {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t flags;      /* sk_cpu_flag, or-ed; 0 on other than x86-64 */
  int32_t isa;         /* the sk_isa that SK_ISA_AUTO stands for */
  int32_t highest_isa; /* the highest sk_isa that this CPU runs */
  uint32_t reserved;
};

struct sk_read_probe_args {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t buffer_bytes; /* cycled over; >= threads * SK_READ_PROBE_BLOCK_BYTES */
  uint64_t pass_bytes;   /* read between two looks at the clock; 0: the default */
  double seconds;        /* no pass begins after this; > 0, <= SK_READ_PROBE_MAX_SECONDS */
  uint32_t max_passes;   /* no more passes than this; 0: SK_READ_PROBE_MAX_PASSES */
  uint32_t threads;      /* 1 .. SK_MAX_THREADS */
  int32_t isa;           /* sk_isa */
  uint32_t reserved;     /* 0 */
};

struct sk_read_probe_result {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t buffer_bytes;  /* really cycled over: rounded down to equal shares of blocks */
  uint64_t bytes_read;    /* by all passes */
  double seconds;         /* of all passes */
  double setup_seconds;   /* spent before them, on memory and threads */
  double median_gb_per_s; /* over the passes */
  double best_gb_per_s;   /* of one pass */
  uint32_t passes;
  uint32_t threads;
  int32_t isa;         /* the sk_isa used, never SK_ISA_AUTO */
  uint32_t pinned;     /* 1: each thread had a CPU of its own */
  uint32_t huge_pages; /* 1: the kernel took the advice to use huge pages */
  uint32_t reserved;
};

/* Some bits of each element of a matrix, row after row. A row is in tiles of SK_COLUMN_TILE
 * columns; with c the column in the tile, element c is
 *
 *   16 bits: the c-th number, a bfloat16;
 *    8 bits: byte c;
 *    4 bits: of byte c % 32 the lower half for c < 32, else the upper;
 *    2 bits: of byte c % 16 the bits 2 (c / 16) and above;
 *    1 bit:  bit c % 8 of byte c / 8;
 *    3 bits: the upper two in a tile of 2 bits, and after it the lowest in a tile of 1 bit. */
struct sk_plane {
  uint32_t abi_version;
  uint32_t struct_size;
  const void* data;
  uint64_t bytes;
  uint64_t row_stride; /* bytes from a row to the next; whole tiles of columns */
  uint32_t bits;
  uint32_t reserved; /* 0 */
};

/* A matrix, in bfloat16 or in integers with a scale and a zero for each group of columns of a row:
 *
 *   element = scale * (code - zero)
 *
 * Rows are stored up to a multiple of SK_ROW_TILE, columns up to one of SK_COLUMN_TILE; bfloat16
 * numbers there are zero, scales too, codes may be anything. A code's bits are in one plane, or the
 * upper ones in `codes` and the lower ones in `low`: 8, 4 + 4, 4, 3 + 1 or 2 + 2.
 *
 * A matrix W of integers may have a low-rank term, W + B A, with a basis A [rank, columns] beside
 * it (ZeroQuant-V2, arXiv 2303.08302; QERA, arXiv 2410.06040). B [rows, rank] is in further columns
 * of the matrix, which are quantized, split in planes and chosen as the others. They begin at
 * `columns` rounded up to SK_COLUMN_TILE and to group_size; what is between is not used. With
 * u = A x, their inputs are
 *
 *   8 bits: u, and zeros up to SK_COLUMN_TILE: a code for each number of B;
 *   4 bits: for each 32 of u, 32 columns with the inputs 16 u and 32 with u: the upper and the
 *           lower half of a code of 8 bits, whose zero is 17 times the zero of both.
 *
 * Where a row is a neuron's column of a down projection D + A^T B^T, they are further outputs y of
 * its product, of which, with z = y or z = 16 y + y, A^T z is added to the others. */
struct sk_matrix {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t rows;
  uint32_t columns;       /* of W, as all columns above */
  uint32_t group_size;    /* columns with one scale: 32, 64 or 128, the last group has the rest;
                             0: bfloat16 */
  uint32_t rank;          /* of a low-rank term; 0: none; else of a layer's integers alone, a
                             multiple of SK_RANK_TILE up to SK_MAX_RANK */
  struct sk_plane codes;  /* all bits of the elements, or the upper ones */
  struct sk_plane low;    /* data null: there is none */
  const uint16_t* scales; /* float16 [row tiles][groups][SK_ROW_TILE]; null with bfloat16 */
  const uint8_t* zeros;   /* the same shape */
  uint64_t scales_count;
  uint64_t zeros_count;
};

/* One decoder layer. `head` below is head_dim rounded up to SK_ROW_TILE, and neurons are rounded up
 * to SK_NEURON_BLOCK, filled with zeros. A null pointer says that the architecture has no such
 * vector. Vectors are float32. */
struct sk_layer {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t num_heads;
  uint32_t num_kv_heads;
  uint32_t intermediate_size;
  uint32_t window;         /* positions that attention sees, its own included; 0: all */
  struct sk_matrix qkv;    /* [(num_heads + 2 num_kv_heads) head, hidden_size]: q, k, v heads */
  struct sk_matrix output; /* [hidden_size, num_heads head_dim] */
  struct sk_matrix gate;   /* [neurons, hidden_size] */
  struct sk_matrix up;     /* [neurons, hidden_size]; where gate is in integers, it is too, with the
                              same group_size */
  struct sk_matrix down;   /* [neurons, hidden_size]: a neuron's column in a row */
  /* The bases of the low-rank terms, in bfloat16; with rank 0 they are not read. q, k and v share
   * one, so do gate and up, which then have one rank and as many bits. A rank of a parallel group
   * holds, of qkv, gate, up and down, those rows of B that it has of W and the whole basis; of
   * output, all of B and those columns of the basis that it has of W. What it computes of the terms
   * of output and down is in what sk_reduce adds up. */
  struct sk_matrix qkv_basis;     /* [qkv.rank, hidden_size] */
  struct sk_matrix output_basis;  /* [output.rank, num_heads head_dim] */
  struct sk_matrix gate_up_basis; /* [gate.rank, hidden_size] */
  struct sk_matrix down_basis;    /* [down.rank, hidden_size] */
  const float* attention_norm;    /* [hidden_size] */
  const float* mlp_norm;          /* [hidden_size] */
  const float* qkv_bias;          /* [(num_heads + 2 num_kv_heads) head] or null */
  const float* output_bias;       /* [hidden_size] or null; of several ranks only one may have it */
  const float* down_bias;         /* the same, added whatever neurons are chosen */
  const float* q_norm;            /* [head_dim] or null */
  const float* k_norm;            /* [head_dim] or null */
  /* What a neuron's importance is multiplied with, see sk_choice; finite, >= 0. Null: sequences
   * cannot choose so. */
  const float* planes_factors; /* [intermediate_size] or null; up and gate are in two planes */
  const float* gate_factors;   /* [intermediate_size] or null */
};

/* Stands in for what a choice leaves out of a layer: its feed-forward gets outputs^T (inputs x)
 * more, with x the input of gate and up. */
struct sk_correction {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t rank; /* 0 .. SK_MAX_CORRECTION_RANK; 0: nothing is added, the matrices are not read */
  uint32_t reserved; /* 0 */
  struct sk_matrix
      inputs; /* [SK_MAX_CORRECTION_RANK, hidden_size] in bfloat16, zero from `rank` on */
  struct sk_matrix outputs; /* the same shape */
};

/* Adds up partial sums of all ranks in place: data [count] float32. Called on one thread of a
 * forward, after the attention output and after the feed-forward, while the others wait. The sums
 * hold output_bias and down_bias: a rank that had one beside another would add it twice. */
struct sk_reduce {
  uint32_t abi_version;
  uint32_t struct_size;
  void (*add_up)(void* context, float* data, uint64_t count); /* null: there is one rank */
  void* context;
};

/* A decoder. The matrices and vectors stay the caller's; on the CPU they must outlive the model,
 * for a GPU they are copied. Structs are copied. */
struct sk_model_args {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t hidden_size;
  uint32_t vocab_size;
  uint32_t head_dim; /* even */
  uint32_t num_layers;
  uint32_t threads; /* 1 .. SK_MAX_THREADS, the caller of a forward among them */
  int32_t isa;      /* sk_isa */
  float rms_norm_eps;
  float rope_scale;              /* of cos and sin: yarn's attention factor, else 1 */
  const float* rope_frequencies; /* [rope_rows, head_dim / 2], radians per position */
  uint32_t rope_rows; /* 1: the same for all positions; else row p is for position p, the last for
                         all beyond */
  uint32_t activation_bits; /* of the inputs of integer matrices: 16, or 8 which is faster */
  uint32_t kv_bits; /* of keys and values in the cache: 16, bfloat16, or 8 with a scale a token */
  uint32_t num_corrections;      /* 0 .. SK_MAX_CORRECTIONS */
  const struct sk_layer* layers; /* [num_layers] */
  const float* norm;             /* [hidden_size] */
  struct sk_matrix embedding;    /* [vocab_size, hidden_size] in bfloat16 */
  struct sk_matrix lm_head;      /* [vocab_size, hidden_size]; may be the embedding */
  struct sk_reduce reduce;
  /* A coarse copy of the LM head: sk_forward multiplies it instead and computes only the rows that
   * may matter from lm_head, which is then bfloat16; see `needed` there. With x the input of the LM
   * head, U = scan_basis and z = U x, row i of the LM head is off by
   *
   *   |<lm_head_i, x> - <scan_i, (x, z)>| <= scan_errors[0][i] |z| + scan_errors[1][i] |x - U^T z|
   *
   * in exact arithmetic; the library adds what its own rounding makes of it. */
  struct sk_matrix scan;       /* [vocab_size, hidden_size rounded up to SK_COLUMN_TILE +
                                  SK_SCAN_DIRECTIONS] in integers of 4 bits with groups of 64;
                                  codes.data null: none, and the next two are not read */
  struct sk_matrix scan_basis; /* [SK_SCAN_DIRECTIONS, hidden_size] in bfloat16 */
  const float* scan_errors;    /* [2, vocab_size], >= 0 */
  const struct sk_correction* corrections; /* [num_corrections, num_layers] */
  /* On a GPU, whose library takes no scan, no reduce, SK_ISA_AUTO and 1 thread; else 0. */
  uint32_t device; /* its number */
  uint32_t graphs; /* 1: steps that come again are launched as CUDA graphs, see sk_graphs_info */
  uint64_t stream; /* the CUstream to compute on; 0: one of the model's own */
  uint64_t core_copy_bytes; /* on the CPU: where all sequences choose by SK_CHOICE_CORE and what is
                               in their cores comes again and again, a copy of these neurons is
                               kept, side by side, and read instead, if it takes no more memory than
                               this. 0: none, on a GPU always */
};

struct sk_model_info {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t model;          /* the handle for the other calls; never 0 */
  uint64_t kv_block_bytes; /* of one KV block in all layers */
  uint64_t device_bytes;   /* of a GPU's memory that the model takes; 0 on the CPU */
  int32_t isa;             /* the sk_isa used, never SK_ISA_AUTO */
  uint32_t threads;
};

/* How a token chooses neurons by their importance, with g = <gate, x>, u = <up, x>. */
enum sk_choice_kind {
  SK_CHOICE_CORE = 0, /* not at all: all of the core are used */
  /* By g' and u', from the upper planes of the codes, to which the mean of all lower bits is added.
   * The importance is |silu(g') u'| planes_factors. What the lower bits may change of it, their
   * noise, is
   *
   *   planes_factors sqrt((d u')^2 v_g + silu(g')^2 v_u + d^2 v_g v_u),  d = silu'(g'),
   *   v = sum over groups of scale^2 (4^lower bits - 1) / 12 (sum of x^2 in the group)
   *
   * Columns of a low-rank term and their inputs count as all others. */
  SK_CHOICE_PLANES = 1,
  SK_CHOICE_GATE = 2 /* |silu(g)| gate_factors */
};

/* Which neurons some tokens use; the others' activations count as zero. What is computed does not
 * depend on the other sequences of a batch, though neurons that any of them uses are read once for
 * all. */
struct sk_choice {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t kind;        /* sk_choice_kind */
  uint32_t correction;  /* 0: none; else the number of one of the model's, from 1 */
  const uint64_t* core; /* null: all neurons; else [num_layers, words], a word for 64 neurons of the
                           widest layer: bit n % 64 of word n / 64 says that neuron n may be used */
  /* Null with SK_CHOICE_CORE, else [num_layers, 3], >= 0, infinity included. A neuron of the core
   * is used where its importance is not below the first. With SK_CHOICE_PLANES its activation is
   * silu(g') u', and where its noise is not below the second silu(g) u; of down the upper plane
   * counts, the mean of all lower bits added and rounded up, and both where its importance is not
   * below the third (and where down is in one plane). */
  const float* thresholds;
  uint64_t core_count;       /* num_layers * words, or 0 */
  uint64_t thresholds_count; /* 3 * num_layers, or 0 */
};

/* What of an activation a (of silu(g) u) the statistics add up, in units of 2^-32. */
enum sk_score {
  SK_SCORE_NORM = 0, /* (a / |a|)^2, |a| over all neurons of the token: GRIFFIN, arXiv 2402.19427 */
  SK_SCORE_COUNT = 1,       /* 1 for the `score_share` of all neurons with the largest |a| */
  SK_SCORE_SIGNED_COUNT = 2 /* 1 for the `score_share` of those with a > 0 with the largest a:
                               CoreInfer, arXiv 2410.18311 */
};

/* Tokens `token_ids` at positions start, start + 1, ... of one sequence. The KV of position p is in
 * block block_table[p / SK_BLOCK_SIZE]; that of earlier positions is there already. */
struct sk_sequence {
  uint32_t abi_version;
  uint32_t struct_size;
  const int32_t* token_ids;   /* [num_tokens] */
  const int32_t* block_table; /* [num_blocks] */
  uint32_t num_tokens;        /* >= 1 */
  uint32_t start;
  uint32_t num_blocks;
  uint32_t statistics_blocks; /* 0, or the number of KV blocks that the tokens touch */
  int64_t* statistics; /* null, or [statistics_blocks, num_layers, widest intermediate_size]: scores
                          of the tokens but position 0, in units of 2^-32, are added; a
                          token whose activations are not finite adds nothing */
  uint32_t score;      /* sk_score */
  float score_share;   /* with a count, > 0, <= 1; equal values: the lower neuron first */
  const struct sk_choice* choice; /* null: all neurons are used; without `prompts` alone */
  uint64_t* reads; /* null, or [num_layers, 4], to which is added, over the tokens: neurons whose
                      gate (with SK_CHOICE_PLANES, the upper planes of gate and up) was looked at;
                      that were used; whose up, or lower planes of gate and up, were read; and
                      whose down was read whole */
};

/* What a forward does with a ragged batch. Row r of the batch is the r-th of all sequences' tokens,
 * in order. Rows of candidates are sorted by (logit descending, id ascending). */
struct sk_forward_args {
  uint32_t abi_version;
  uint32_t struct_size;
  const struct sk_sequence* sequences; /* [num_sequences] */
  void* kv; /* [layer][kv_num_blocks] blocks, each [num_kv_heads] x (keys, values, with kv_bits 8
               their scales); written. On a GPU in its memory, all else in the caller's */
  uint64_t kv_bytes;
  uint32_t kv_num_blocks;
  uint32_t num_sequences;
  uint32_t num_outputs; /* rows whose candidates are wanted */
  uint32_t num_hidden;  /* rows whose hidden state is wanted */
  uint32_t prompts;     /* 1: the tokens are of prompts: integer matrices of the layers may be
                           multiplied faster, with other roundings; else 0 */
  uint32_t reserved;    /* 0 */
  const uint32_t* output_rows; /* [num_outputs] */
  const float* temperatures;   /* [num_outputs] > 0 */
  const uint32_t* hidden_rows; /* [num_hidden] */
  uint64_t logits_count;       /* num_outputs * vocab_size; where logits is null, 0 */
  uint64_t candidates_count;   /* num_outputs * min(SK_NUM_CANDIDATES, vocab_size) */
  uint64_t hidden_count;       /* num_hidden * hidden_size */
  float* logits;               /* [num_outputs, vocab_size]. On a GPU null: they stay there, for
                                  sk_device_logits; num_outputs is then at most SK_LEFT_LOGITS */
  int32_t* candidate_ids;      /* [num_outputs, candidates] */
  float* candidate_logits;     /* [num_outputs, candidates] */
  float* log_normalizers;      /* [num_outputs] logsumexp((row - its largest) / temperature) */
  float* log_normalizers_1;    /* [num_outputs] the same at temperature 1 */
  float* hidden;               /* [num_hidden, hidden_size] after the last layer, before the norm */
  double* phase_seconds;       /* null, or [SK_NUM_PHASES] by sk_phase: wall time, set */
  /* Null, or [num_outputs] how many of a row's candidates matter; 0: all, and the whole row. Where
   * the model has a scan, none is 0 and the sum at most SK_SCAN_NEEDED, the candidates beyond these
   * may be -1, the row's normalizers NaN and its logits approximations; what matters has the bits
   * that it has without. Then rescored is below vocab_size, and of all rows or of none. */
  const uint32_t* needed;
  uint32_t*
      rescored; /* with `needed`, [num_outputs]: logits of the row computed from lm_head; set */
  uint64_t* union_reads; /* null, or [num_layers, 4]: `reads` of all tokens together, each neuron
                            once; set. All neurons are, where no sequence chooses */
};

/* Of a forward's time. */
enum sk_phase {
  SK_PHASE_QKV = 0,       /* norm, projections, RoPE, KV append */
  SK_PHASE_ATTENTION = 1, /* over the KV cache */
  SK_PHASE_OUTPUT = 2,    /* its output projection */
  SK_PHASE_MLP = 3,       /* norm and feed-forward */
  SK_PHASE_HEAD = 4,      /* final norm and LM head */
  SK_PHASE_CANDIDATES = 5 /* the likeliest tokens and the normalizers */
};

/* The LM head alone, on hidden states that a forward returned. */
struct sk_logits_args {
  uint32_t abi_version;
  uint32_t struct_size;
  const float* hidden; /* [rows, hidden_size] */
  float* logits;       /* [rows, vocab_size] */
  uint64_t hidden_count;
  uint64_t logits_count;
  uint32_t rows;
  uint32_t reserved; /* 0 */
};

/* A GPU. */
struct sk_device_info {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t total_bytes;
  uint64_t free_bytes; /* now */
  uint32_t capability; /* 90 for 9.0 */
  uint32_t multiprocessors;
  uint32_t driver; /* the newest CUDA that its driver knows, 13000 for 13.0 */
  uint32_t coded;  /* 1: the library has code for it, its own or by sk_device_load */
  uint8_t name[64];
};

/* Forwards of few tokens, of no prompts, without statistics, hidden states and phase_seconds, that
 * differ in nothing but tokens, positions, block tables and choices, as those that decode do: from
 * the second on they are one launch of a graph on a GPU. */
struct sk_graphs_info {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t captures; /* graphs made */
  uint64_t launches; /* of graphs, one a forward */
  uint32_t kept;     /* graphs that there are */
  uint32_t reserved;
  uint8_t why_not[256]; /* text: why there are none any more, which a failure to make one ends; else
                           empty */
};

/* The SK_ABI_VERSION that the library was built with. */
SK_API uint32_t sk_abi_version(void);

/* Text of the last failure on the calling thread ("" before the first), valid until its next. */
SK_API const char* sk_last_error(void);

/* Where the compiler put a field of a struct of this header, and how many bytes it has; with a null
 * field_name, offset 0 and the size of the struct. */
SK_API int32_t sk_struct_layout(const char* struct_name, const char* field_name, uint64_t* offset,
                                uint64_t* bytes);

SK_API int32_t sk_cpu_features(struct sk_cpu_info* info);

/* Measures how fast `threads` threads together read memory: the ceiling of any kernel that streams
 * weights. Each thread fills and then cycles over its own share of the buffer. Threads are pinned
 * to CPUs of the caller's affinity mask if it has that many. Takes setup_seconds + seconds + the
 * rest of the last pass; filling the buffer takes of the order of 0.2 s a GiB. */
SK_API int32_t sk_read_probe(const struct sk_read_probe_args* args,
                             struct sk_read_probe_result* result);

/* Makes a model, with its threads. Reads every matrix once: weights that are not finite are
 * refused. */
SK_API int32_t sk_model_create(const struct sk_model_args* args, struct sk_model_info* info);

/* Ends a model's threads and frees what the library allocated. Waits for a forward that runs; those
 * that wait for their turn are refused. In a process that was forked after sk_model_create a model
 * cannot be used or destroyed: its calls return SK_STATUS_UNSUPPORTED. */
SK_API int32_t sk_model_destroy(uint64_t model);

/* Computes a batch: writes KV and everything that `args` asks for. A sequence's bits do not depend
 * on its batch mates, on how its tokens are cut into forwards of one kind (`prompts`), or on the
 * number of threads. Two
 * sequences of a batch must not share a block that either of them writes. Where it fails, KV and
 * results are undefined. */
SK_API int32_t sk_forward(uint64_t model, const struct sk_forward_args* args);

SK_API int32_t sk_logits(uint64_t model, const struct sk_logits_args* args);

/* How many GPUs there are; 0 where there is no driver, and sk_last_error() says why. */
SK_API int32_t sk_device_count(uint32_t* count);

SK_API int32_t sk_device_describe(uint32_t device, struct sk_device_info* info);

/* Gives a GPU its code, a cubin or PTX of cuda/kernels.cu, where the library was built without. */
SK_API int32_t sk_device_load(uint32_t device, const void* image, uint64_t bytes);

/* A row of logits that the last sk_forward, with null as its `logits`, left on the GPU: of its
 * row-th output. The next sk_forward or sk_logits overwrites them. */
SK_API int32_t sk_device_logits(uint64_t model, uint32_t row, float* logits, uint64_t count);

SK_API int32_t sk_device_graphs(uint64_t model, struct sk_graphs_info* info);

/* Memory of a GPU, zeroed, for KV. */
SK_API int32_t sk_device_allocate(uint32_t device, uint64_t bytes, uint64_t* address);
SK_API int32_t sk_device_free(uint32_t device, uint64_t address);

/* Copies to and from such memory, after all forwards on it. */
SK_API int32_t sk_device_read(uint32_t device, void* to, uint64_t address, uint64_t bytes);
SK_API int32_t sk_device_write(uint32_t device, uint64_t address, const void* from, uint64_t bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SPARSE_KERNELS_H_ */
