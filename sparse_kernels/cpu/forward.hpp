// A forward: all threads go through the layers together. In each phase they take units of work,
// until none is left, and meet at a barrier; what a unit computes does not depend on who computes
// it. For a few tokens the thread that comes last to a barrier does the small work between two
// phases, instead of a phase with a barrier of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <vector>

#include "model.hpp"
#include "scan.hpp"

namespace sk {

constexpr size_t kFewTokens = 4;  // done by one thread between two phases
constexpr size_t kTokenUnit = 8;  // tokens in a unit of work per token

struct Token {
  int32_t id;
  uint32_t position;
  const sk_sequence* sequence;
  uint32_t place;  // of the sequence in the batch
};

// Some queries of one sequence that attend together.
struct QueryTile {
  const sk_sequence* sequence;
  uint32_t row, count;  // tokens, rows of the batch
};

// Tokens of one sequence in one KV block, whose statistics are wanted.
struct StatisticsUnit {
  const sk_sequence* sequence;
  uint32_t row, count;
  int64_t* sums;  // [num_layers, widest]
};

// How many units of its range a thread, or those that helped it, took.
struct alignas(64) Range {
  std::atomic<size_t> taken{0};
};

// What a thread has for itself.
struct Own {
  uint32_t index;
  float* normed;   // [kTokenUnit, input_stride_] inputs of products
  float* scratch;  // for one unit of work
};

// What of a block of neurons a token looks at, uses, reads whole; see `reads` of sk_sequence.
struct BlockReads {
  BlockMask looked, used, whole, down_whole;
};
constexpr size_t kReadKinds = sizeof(BlockReads) / sizeof(BlockMask);

// Weights that a thread will read after the next barrier; while it waits there it fetches them into
// its cache.
struct Upcoming {
  const char* at;
  const char* end;
};

// Running softmax of one query row.
struct SoftmaxState {
  float largest, total;
};

class Forward {
 public:
  // `args` are checked and outlive it. Both throw std::bad_alloc.
  Forward(Model& model, const sk_forward_args& args);
  void run();

 private:
  using Clock = std::chrono::steady_clock;

  struct Span {
    uint32_t first_chunk, last_chunk;  // chunks that somebody in a tile sees: [first, last)
    uint32_t end;                      // position after the last one seen
  };

  // Who does what.
  void lay_out();
  void lay_out_statistics(const sk_sequence& sequence, uint32_t first_row);
  // Whether all sequences have a core and what is in any of these is read from the copy.
  bool take_copy();
  std::vector<QueryTile> query_tiles(uint32_t group) const;
  void allocate();
  // Long contexts of few sequences: chunks of one query tile are shared out, and merged afterwards.
  void split_attention();

  // Calls unit(i) for all i below `count`; then between() on one thread. Each thread has a range of
  // its own, in order, and helps the others when it is through.
  template <typename Unit, typename Between>
  void phase(const Own& own, size_t count, Unit&& unit, Between&& between,
             Upcoming upcoming = {nullptr, nullptr}) {
    const size_t threads = ranges_.size();
    for (size_t i = 0; i < threads; ++i) {
      const size_t owner = (own.index + i) % threads;
      const size_t begin = count * owner / threads, end = count * (owner + 1) / threads;
      std::atomic<size_t>& taken = ranges_[owner].taken;
      while (taken.load(std::memory_order_relaxed) < end - begin) {
        const size_t place = taken.fetch_add(1, std::memory_order_relaxed);
        if (place < end - begin) unit(begin + place);
      }
    }
    m_.barrier.arrive_and_wait(
        [&] {
          for (Range& range : ranges_) range.taken.store(0, std::memory_order_relaxed);
          between();
        },
        [&] {
          for (int i = 0; i < 8 && upcoming.at < upcoming.end; ++i, upcoming.at += 64) {
            __builtin_prefetch(upcoming.at, 0, 3);
          }
        });
  }
  template <typename Unit>
  void phase(const Own& own, size_t count, Unit&& unit) {
    phase(own, count, unit, [] {});
  }
  // The beginning of a thread's share of a matrix, of the projection after a layer's attention, and
  // of what follows a layer.
  Upcoming share_of(const Matrix& matrix, size_t rows, const Own& own) const;
  Upcoming output_share(const Layer& layer, const Own& own) const {
    return share_of(layer.output, m_.hidden, own);
  }
  Upcoming gate_share(const Layer& layer, size_t index, const Own& own) const;
  Upcoming next_share(size_t layer, const Own& own) const;

  // unit(begin, end) for all tokens, after a phase: on its last thread, or as a phase of its own.
  template <typename Body>
  void then_per_token(const Own& own, const Body& body) {
    if (count_ <= kFewTokens) return;
    phase(own, (count_ + kTokenUnit - 1) / kTokenUnit,
          [&](size_t i) { body(i * kTokenUnit, std::min(count_, (i + 1) * kTokenUnit)); });
  }
  template <typename Body>
  void if_few_tokens(const Body& body) {
    if (count_ <= kFewTokens) body(0, count_);
  }

  // What multiplies the tokens with a matrix of a layer.
  const Products& products(const Matrix& matrix) const {
    return args_.prompts != 0 ? *matrix.prompts : *matrix.products;
  }

  void tick(sk_phase phase, uint32_t index);
  // On each thread. Nothing may be thrown here: the others would wait at a barrier for ever.
  void work(uint32_t index);

  // The layers.
  void embed(size_t from, size_t to);
  // The inputs of the products with `matrix`: normed residuals.
  void norm_tokens(const float* weight, const Matrix& matrix, const Matrix& basis, size_t from,
                   size_t to, const Own& own);
  // What choices need of the same tokens beside; their inputs are still in `own`.
  void store_for_choices(const Layer& layer, size_t from, size_t to, const Own& own);
  // The inputs [at most kTokenUnit, stride] of tokens from `from` on, n numbers each, become those
  // of the products with `matrix`, whose low-rank term, if it has one, has this basis.
  void store_inputs(const Matrix& matrix, const Matrix& basis, size_t n, size_t from, size_t to,
                    float* inputs, size_t stride, void* operand, const Own& own);
  size_t low_rank_floats(const Matrix& basis) const;  // of scratch, for store_inputs
  // Between two phases one thread reads a basis, while the others wait: in unit i of the `count`
  // before, each thread fetches a part of it into its cache. Always inline: GCC drops calls of a
  // function that does nothing but prefetch.
  __attribute__((always_inline)) inline void fetch_basis(const Matrix& matrix, const Matrix& basis,
                                                         size_t i, size_t count,
                                                         const Own& own) const {
    if (matrix.rank == 0 || count_ > kFewTokens) return;
    const size_t threads = ranges_.size(), bytes = matrix.rank * basis.stride;
    const size_t begin = count * own.index / threads, end = count * (own.index + 1) / threads;
    if (i < begin || i >= end) return;  // another thread's
    const size_t first = bytes * (i - begin) / (end - begin) / 64 * 64;
    const size_t last = bytes * (i - begin + 1) / (end - begin);
    for (size_t at = first; at < last; at += 64) __builtin_prefetch(basis.codes + at, 0, 2);
  }
  // A unit is a head of q, k or v.
  void project(const Layer& layer, const Own& own);
  void append(const Layer& layer, uint32_t head, bool is_key, const float* heads);
  uint8_t* kv_block(const Layer& layer, int32_t block, uint32_t head) const;
  void output(const Layer& layer, size_t index, const Own& own);
  // With several ranks: adds up all ranks' partial sums, then adds them to the residual.
  void reduce_all();
  // Where the outputs of a sublayer are added up: the residual itself if there is one rank. Before
  // that a bias [hidden], unless it is null, is added to `values`.
  void take(size_t token, size_t column, const float* bias, float* values, size_t n);
  // The outputs by the scan; false where the whole LM head must be computed.
  bool scan(const Own& own);
  void copy_hidden();
  void head(const Own& own);
  void choose(size_t i) noexcept;

  // attention.cpp
  Span span_of(const Layer& layer, const QueryTile& tile) const;
  // One chunk of positions for a tile and KV head, into `values`, `largest`, `total`.
  void attend_chunk(const Layer& layer, const QueryTile& tile, const Span& span, uint32_t head,
                    uint32_t chunk_index, float* values, float* largest, float* total);
  void attend(const Layer& layer, const Own& own);
  void attend_whole(const Layer& layer, const QueryTile& tile, uint32_t head, float* scratch);
  // Where the results of (tile, head, chunk) begin, in rows.
  size_t part_row(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t chunk) const;
  void attend_part(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t chunk);
  void merge_parts(const Layer& layer, const QueryTile& tile, uint32_t head, float* scratch);
  // Running softmax (arXiv 1805.02867), one row.
  void merge(SoftmaxState* state, float* values, float largest, float total,
             const float* more) const;
  void finish_row(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t row,
                  const SoftmaxState& state, const float* values);

  // feed_forward.cpp
  void feed_forward(const Layer& layer, size_t index, const Own& own);
  // Blocks [first, last) of neurons.
  void activate(const Layer& layer, size_t first, size_t last, float* scratch);
  // choice.cpp
  // The same, of at most kChosenBlocks blocks, where some sequence chooses its neurons; sets what
  // any token uses of them. `fetched`: their first rows were, see add_first_rows.
  void activate_chosen(const Layer& layer, size_t index, size_t first, size_t last, bool fetched,
                       const Own& own);
  // Adds what is read first of blocks [first, last) to `fetch`.
  void add_first_rows(const Layer& layer, size_t index, size_t first, size_t last,
                      Fetch* fetch) const;
  // Of a token before it chooses.
  BlockMask core_of(const Layer& layer, size_t index, size_t block, const Token& token) const;
  // By the upper bits of gate and up, for all tokens that choose so; their gate and up are in
  // `high` [2, tokens, stride].
  void choose_by_planes(const Layer& layer, size_t index, size_t block, const float* high,
                        size_t stride, BlockReads* reads) const;
  void choose_by_gate(const Layer& layer, size_t index, size_t block, const float* gate,
                      size_t stride, BlockReads* reads) const;
  void count_reads(const BlockReads* reads, const Own& own);
  // Hands all threads' counts on; on one thread.
  void tell_reads(size_t index);
  // What stands in for the neurons left out, for all tokens.
  void correct(size_t index, float* scratch, float* out);
  size_t reads_stride() const { return (args_.num_sequences + 1) * kReadKinds + 8; }

  // A unit of ChosenUnits, where some sequence chooses its neurons.
  void add_chosen(const Layer& layer, size_t index, uint32_t unit, const Own& own);
  // The same from the copy of all tokens' cores.
  void add_copied(const Layer& layer, size_t index, uint32_t unit, const Own& own);
  // Of a block, from what its neurons in the core have side by side, [tokens, stride].
  void activate_copied(const Layer& layer, size_t index, size_t block, const float* gate,
                       const float* up, size_t stride, const Own& own);
  bool is_copied(size_t index) const {
    return copied_ && !m_.core_copy.layer(index).starts.empty();
  }
  // Some neurons' part of the down product in some columns; the neurons are a partition, whose rows
  // are the layer's or of a copy.
  void down(const Layer& layer, size_t first, size_t last, size_t column, size_t columns,
            float* out, bool add, Fetch* fetch = nullptr, const CopiedLayer* copy = nullptr);
  // The partitions' sums of one token, in order, and its low-rank term are added to its residual.
  void add_partitions(const Layer& layer, size_t partitions, size_t token);
  void add_statistics(const StatisticsUnit& unit, const Layer& layer, size_t index, float* scratch);

  Model& m_;
  const Kernels& k_;
  const sk_forward_args& args_;

  std::vector<Token> tokens_;  // rows of the batch
  size_t count_ = 0;           // of them
  bool fused_ = false;
  bool choosing_ = false,
       corrected_ = false;         // some sequence chooses neurons; and has a correction
  bool copied_ = false;            // all have a core, and there is a copy of what is in any
  std::vector<BlockMask> used_;    // of each block, by any token, by all bits of down
  std::vector<BlockMask> coarse_;  // of each block and token, by its upper ones
  std::vector<uint64_t> reads_;    // [threads][sequences, and their union][kReadKinds]
  std::vector<std::vector<QueryTile>> tiles_;  // by heads per KV head
  std::vector<StatisticsUnit> statistics_;
  bool split_ = false;
  size_t most_chunks_ = 0;
  size_t input_stride_ = 0;  // of what is normed

  float *x_ = nullptr, *queries_ = nullptr, *mixed_ = nullptr, *partial_ = nullptr;
  float *plain_ = nullptr, *reduced_ = nullptr, *cos_ = nullptr, *sin_ = nullptr;
  float* squares_ = nullptr;  // of the feed-forward's inputs, by groups, for choices by planes
  float *chunk_values_ = nullptr, *chunk_largest_ = nullptr, *chunk_total_ = nullptr;
  void *operand_ = nullptr, *attention_operand_ = nullptr, *activations_ = nullptr;
  void *output_operand_ = nullptr, *correction_operand_ = nullptr;

  std::vector<Range> ranges_;  // of each thread
  std::optional<Scan> scan_;   // where the candidates that matter are enough
  std::atomic<bool> out_of_memory_{false};
  Clock::time_point mark_;
};

}  // namespace sk
