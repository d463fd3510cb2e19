// A forward: all threads go through the layers together. In each phase they take units of work from
// a counter until none is left, and meet at a barrier; what a unit computes does not depend on who
// computes it. For a few tokens the thread that comes last to a barrier does the small work between
// two phases, instead of a phase with a barrier of its own.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>

#include "candidates.hpp"
#include "error.hpp"
#include "guard.hpp"
#include "model.hpp"

namespace sk {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kFewTokens = 4;     // done by one thread between two phases
constexpr size_t kFusedTokens = 16;  // feed-forward in one phase, with partial sums per partition
constexpr size_t kTokenUnit = 8;     // tokens in a unit of work per token
constexpr size_t kHeadRows = 256;    // rows of the LM head in a unit
constexpr size_t kOutputRows = 32;   // rows of the attention's output projection in a unit
constexpr size_t kDownColumns = 64;  // columns of the down product in a unit

struct Token {
  int32_t id;
  uint32_t position;
  const sk_sequence* sequence;
};

// Some queries of one sequence that attend together.
struct QueryTile {
  const sk_sequence* sequence;
  uint32_t row, count;  // tokens, rows of the batch
};

// Tokens of one sequence in one KV block, whose statistics are wanted.
struct StatisticsUnit {
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
  float* normed;   // [hidden]
  float* scratch;  // for one unit of work
};

// Running softmax of one query row.
struct SoftmaxState {
  float largest, total;
};

class Forward {
 public:
  Forward(Model& model, const sk_forward_args& args)
      : m_(model), k_(*model.kernels), args_(args), ranges_(model.pool.threads()) {
    lay_out();
    allocate();
  }

  void run() {
    if (args_.phase_seconds != nullptr) {
      std::fill_n(args_.phase_seconds, SK_NUM_PHASES, 0.0);
      mark_ = Clock::now();
    }
    m_.pool.run([](void* self, uint32_t index) { static_cast<Forward*>(self)->work(index); }, this);
  }

 private:
  // ---- who does what -----------------------------------------------------------------------

  void lay_out() {
    for (uint32_t s = 0; s < args_.num_sequences; ++s) {
      const sk_sequence& sequence = args_.sequences[s];
      const uint32_t row = static_cast<uint32_t>(tokens_.size());
      for (uint32_t i = 0; i < sequence.num_tokens; ++i) {
        tokens_.push_back({sequence.token_ids[i], sequence.start + i, &sequence});
      }
      if (sequence.statistics != nullptr) lay_out_statistics(sequence, row);
    }
    count_ = tokens_.size();
    fused_ = count_ <= kFusedTokens;
  }

  void lay_out_statistics(const sk_sequence& sequence, uint32_t first_row) {
    const size_t block_sums = m_.layers.size() * m_.widest;
    const uint32_t end = sequence.start + sequence.num_tokens;
    const uint32_t first_block = sequence.start / SK_BLOCK_SIZE;
    for (uint32_t block = first_block; block * SK_BLOCK_SIZE < end; ++block) {
      // The attention sink, position 0, counts nowhere.
      const uint32_t from = std::max({block * SK_BLOCK_SIZE, sequence.start, 1u});
      const uint32_t to = std::min((block + 1) * SK_BLOCK_SIZE, end);
      if (from >= to) continue;
      statistics_.push_back({first_row + from - sequence.start, to - from,
                             sequence.statistics + (block - first_block) * block_sums});
    }
  }

  std::vector<QueryTile> query_tiles(uint32_t group) const {
    std::vector<QueryTile> tiles;
    const uint32_t most = std::max(1u, kAttentionRows / group);
    uint32_t row = 0;
    for (uint32_t s = 0; s < args_.num_sequences; ++s) {
      const sk_sequence& sequence = args_.sequences[s];
      for (uint32_t done = 0; done < sequence.num_tokens; done += most) {
        tiles.push_back({&sequence, row + done, std::min(most, sequence.num_tokens - done)});
      }
      row += sequence.num_tokens;
    }
    return tiles;
  }

  void allocate() {
    const size_t t = count_, columns = m_.columns;
    const size_t mixed_columns = round_up(size_t{m_.most_heads} * m_.head_dim, SK_COLUMN_TILE);
    const size_t neurons = round_up(m_.widest, SK_NEURON_BLOCK);
    size_t partitions = 0, most_blocks = 0;  // of a partition
    for (const Layer& layer : m_.layers) {
      partitions = std::max<size_t>(partitions, layer.partitions);
      most_blocks = std::max<size_t>(most_blocks, layer.blocks / layer.partitions + 1);
      const uint32_t group = layer.heads / layer.kv_heads;
      if (tiles_.size() <= group) tiles_.resize(group + 1);
      if (tiles_[group].empty()) tiles_[group] = query_tiles(group);
    }
    x_ = m_.x.get<float>(t * columns);
    operand_ = m_.operand.get(k_.operand_bytes(t, columns));
    attention_operand_ = m_.attention_operand.get(k_.operand_bytes(t, mixed_columns));
    queries_ = m_.queries.get<float>(t * m_.most_heads * m_.dim);
    mixed_ = m_.mixed.get<float>(t * mixed_columns);
    partial_ = m_.partial.get<float>((fused_ ? partitions : 1) * t * columns);
    activations_ = m_.activations.get(k_.activation_bytes(t, neurons));
    if (!statistics_.empty()) plain_ = m_.plain.get<float>(t * neurons);
    if (m_.reduce.add_up != nullptr) reduced_ = m_.reduced.get<float>(t * columns);
    cos_ = m_.cos.get<float>(t * (m_.head_dim / 2));
    sin_ = m_.sin.get<float>(t * (m_.head_dim / 2));
    split_attention();
    if (args_.num_outputs != 0) {
      output_operand_ = m_.output_operand.get(k_.operand_bytes(args_.num_outputs, columns));
    }
    const size_t rows = std::max<size_t>(t, args_.num_outputs);
    const size_t per_token = std::max<size_t>(
        std::max<size_t>(2 * SK_NEURON_BLOCK * (fused_ ? most_blocks : 1), m_.dim), kOutputRows);
    const size_t floats = std::max(rows * per_token, args_.num_outputs * kHeadRows) + columns +
                          mixed_columns + kAttentionRows * m_.dim * 2 + 4 * kAttentionRows;
    for (Scratch& scratch : m_.scratch) scratch.get<float>(floats);
  }

  // Long contexts of few sequences: chunks of one query tile are shared out, and merged afterwards.
  void split_attention() {
    size_t longest = 0, fewest = SIZE_MAX;
    for (const Token& token : tokens_) longest = std::max<size_t>(longest, token.position + 1);
    for (const Layer& layer : m_.layers) {
      const size_t tiles = tiles_[layer.heads / layer.kv_heads].size();
      fewest = std::min(fewest, tiles * layer.kv_heads);
    }
    most_chunks_ = (longest + kAttentionChunk - 1) / kAttentionChunk;
    split_ = most_chunks_ > 1 && m_.pool.threads() > 1 && count_ <= kFusedTokens &&
             fewest < 4 * m_.pool.threads();
    if (!split_) return;
    const size_t rows = count_ * m_.most_heads * most_chunks_;
    chunk_values_ = m_.chunk_state.get<float>(rows * (m_.dim + 2));
    chunk_largest_ = chunk_values_ + rows * m_.dim;
    chunk_total_ = chunk_largest_ + rows;
  }

  // ---- threads -------------------------------------------------------------------------------

  // Calls unit(i) for all i below `count`; then between() on one thread. Each thread has a range of
  // its own, in order, and helps the others when it is through.
  template <typename Unit, typename Between>
  void phase(const Own& own, size_t count, Unit&& unit, Between&& between) {
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
    m_.barrier.arrive_and_wait([&] {
      for (Range& range : ranges_) range.taken.store(0, std::memory_order_relaxed);
      between();
    });
  }
  template <typename Unit>
  void phase(const Own& own, size_t count, Unit&& unit) {
    phase(own, count, unit, [] {});
  }

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

  void tick(sk_phase phase, uint32_t index) {
    if (index != 0 || args_.phase_seconds == nullptr) return;
    const Clock::time_point now = Clock::now();
    args_.phase_seconds[phase] += std::chrono::duration<double>(now - mark_).count();
    mark_ = now;
  }

  void work(uint32_t index) {
    k_.begin_thread();
    float* memory = m_.scratch[index].get<float>(0);
    const Own own = {index, memory, memory + m_.columns};
    const auto begin = [&](size_t from, size_t to) {
      embed(from, to);
      norm_tokens(m_.layers[0].attention_norm, from, to, own.normed);
    };
    phase(own, 1, [&](size_t) { if_few_tokens(begin); });
    then_per_token(own, begin);
    for (size_t i = 0; i < m_.layers.size(); ++i) {
      const Layer& layer = m_.layers[i];
      project(layer, own);
      tick(SK_PHASE_QKV, index);
      attend(layer, own);
      tick(SK_PHASE_ATTENTION, index);
      output(layer, own);
      tick(SK_PHASE_OUTPUT, index);
      feed_forward(layer, i, own);
      tick(SK_PHASE_MLP, index);
    }
    head(own);
    tick(SK_PHASE_HEAD, index);
    phase(own, args_.num_outputs, [&](size_t i) { choose(i); });
    tick(SK_PHASE_CANDIDATES, index);
    k_.end_thread();
  }

  // ---- the layers ----------------------------------------------------------------------------

  void embed(size_t from, size_t to) {
    const size_t half = m_.head_dim / 2;
    for (size_t t = from; t < to; ++t) {
      const Token& token = tokens_[t];
      float* x = x_ + t * m_.columns;
      k_.embed(m_.embedding.data + static_cast<size_t>(token.id) * m_.embedding.stride, m_.hidden,
               x);
      const size_t row = std::min(token.position, m_.rope_rows - 1);
      const float* frequencies = m_.rope_frequencies.data() + row * half;
      for (size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(token.position) * frequencies[i];
        cos_[t * half + i] = std::cos(angle) * m_.rope_scale;
        sin_[t * half + i] = std::sin(angle) * m_.rope_scale;
      }
    }
  }

  // The inputs of the next products: normed residuals.
  void norm_tokens(const float* weight, size_t from, size_t to, float* normed) {
    for (size_t t = from; t < to; ++t) norm_token(weight, t, t, operand_, normed);
  }

  void norm_token(const float* weight, size_t row, size_t place, void* operand, float* normed) {
    k_.rms_norm(x_ + row * m_.columns, weight, m_.hidden, m_.eps, normed);
    k_.store_operand(normed, m_.hidden, m_.columns, place, operand);
  }

  uint16_t* kv_block(const Layer& layer, int32_t block, uint32_t head) const {
    const size_t head_elements = size_t{2} * SK_BLOCK_SIZE * m_.dim;
    return static_cast<uint16_t*>(args_.kv) + layer.kv_offset * args_.kv_num_blocks +
           (static_cast<size_t>(block) * layer.kv_heads + head) * head_elements;
  }

  // A unit is a head of q, k or v.
  void project(const Layer& layer, const Own& own) {
    float* const scratch = own.scratch;
    phase(own, layer.heads + 2 * layer.kv_heads, [&](size_t head) {
      const uint32_t group = layer.heads / layer.kv_heads;
      const bool is_query = head < layer.heads,
                 is_key = !is_query && head < layer.heads + layer.kv_heads;
      HeadTask task = {};
      task.tokens = static_cast<uint32_t>(count_);
      task.head_dim = m_.head_dim;
      task.dim = m_.dim;
      task.eps = m_.eps;
      task.scale = 1;
      task.heads = scratch;
      task.stride = m_.dim;
      if (is_query) {  // [kv head, token, head of the group, dim]
        task.heads = queries_ + (head / group * count_ * group + head % group) * m_.dim;
        task.stride = group * m_.dim;
        task.norm = layer.q_norm;
        task.scale = 1.0f / std::sqrt(static_cast<float>(m_.head_dim));
      }
      if (is_key) task.norm = layer.k_norm;
      if (is_query || is_key) {
        task.cos = cos_;
        task.sin = sin_;
      }
      if (layer.qkv_bias != nullptr) task.bias = layer.qkv_bias + head * m_.dim;
      const size_t first = head * m_.dim;
      k_.dot(rows_from(layer.qkv, first), m_.dim, m_.columns, operand_, count_, task.heads,
             task.stride);
      k_.finish_heads(&task);
      if (!is_query)
        append(layer, static_cast<uint32_t>((head - layer.heads) % layer.kv_heads), is_key,
               scratch);
    });
  }

  void append(const Layer& layer, uint32_t head, bool is_key, const float* heads) {
    for (size_t t = 0; t < count_; ++t) {
      const Token& token = tokens_[t];
      const int32_t block = token.sequence->block_table[token.position / SK_BLOCK_SIZE];
      const auto store = is_key ? k_.append_key : k_.append_value;
      store(heads + t * m_.dim, m_.dim, token.position % SK_BLOCK_SIZE,
            kv_block(layer, block, head));
    }
  }

  // ---- attention -----------------------------------------------------------------------------

  struct Span {
    uint32_t first_chunk, last_chunk;  // chunks that somebody in the tile sees: [first, last)
    uint32_t end;                      // position after the last one seen
  };

  Span span_of(const Layer& layer, const QueryTile& tile) const {
    const uint32_t first = tokens_[tile.row].position;
    const uint32_t last = tokens_[tile.row + tile.count - 1].position;
    const uint32_t seen =
        layer.window != 0 && first + 1 > layer.window ? first + 1 - layer.window : 0;
    return {seen / kAttentionChunk, last / kAttentionChunk + 1, last + 1};
  }

  // One chunk of positions for a tile and KV head, into `values`, `largest`, `total`.
  void attend_chunk(const Layer& layer, const QueryTile& tile, const Span& span, uint32_t head,
                    uint32_t chunk_index, float* values, float* largest, float* total) {
    const uint32_t group = layer.heads / layer.kv_heads;
    int32_t first[kAttentionRows], last[kAttentionRows];
    for (uint32_t i = 0; i < tile.count * group; ++i) {
      const uint32_t position = tokens_[tile.row + i / group].position;
      last[i] = static_cast<int32_t>(position);
      first[i] = layer.window != 0 && position + 1 > layer.window
                     ? static_cast<int32_t>(position + 1 - layer.window)
                     : 0;
    }
    AttentionChunk chunk = {};
    chunk.queries = queries_ + (head * count_ + tile.row) * group * m_.dim;
    chunk.rows = tile.count * group;
    chunk.dim = m_.dim;
    chunk.first = first;
    chunk.last = last;
    chunk.begin = chunk_index * kAttentionChunk;
    chunk.end = std::min(span.end, chunk.begin + kAttentionChunk);
    chunk.block_table = tile.sequence->block_table;
    chunk.kv = kv_block(layer, 0, head);
    chunk.block_stride = size_t{layer.kv_heads} * 2 * SK_BLOCK_SIZE * m_.dim;
    chunk.largest = largest;
    chunk.total = total;
    chunk.values = values;
    k_.attend(&chunk);
  }

  // Running softmax (arXiv 1805.02867), one row.
  void merge(SoftmaxState* state, float* values, float largest, float total,
             const float* more) const {
    if (largest == -INFINITY) return;  // the chunk held nothing for this row
    if (state->total == 0) {
      *state = {largest, total};
      std::copy_n(more, m_.dim, values);
      return;
    }
    const float top = std::max(state->largest, largest);
    const float keep = std::exp(state->largest - top), take = std::exp(largest - top);
    *state = {top, state->total * keep + total * take};
    for (size_t i = 0; i < m_.dim; ++i) values[i] = values[i] * keep + more[i] * take;
  }

  void finish_row(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t row,
                  const SoftmaxState& state, const float* values) {
    const uint32_t group = layer.heads / layer.kv_heads;
    const size_t width = round_up(size_t{layer.heads} * m_.head_dim, SK_COLUMN_TILE);
    float* to =
        mixed_ + (tile.row + row / group) * width + (head * group + row % group) * m_.head_dim;
    const float factor = 1.0f / state.total;
    for (size_t i = 0; i < m_.head_dim; ++i) to[i] = values[i] * factor;
  }

  void attend(const Layer& layer, const Own& own) {
    float* const scratch = own.scratch;
    const std::vector<QueryTile>& tiles = tiles_[layer.heads / layer.kv_heads];
    const auto store = [&](size_t from, size_t to) {
      const size_t n = size_t{layer.heads} * m_.head_dim, width = round_up(n, SK_COLUMN_TILE);
      for (size_t t = from; t < to; ++t) {
        k_.store_operand(mixed_ + t * width, n, width, t, attention_operand_);
      }
    };
    const size_t heads = tiles.size() * layer.kv_heads;
    if (split_) {
      phase(own, heads * most_chunks_, [&](size_t i) {
        attend_part(layer, tiles[i / most_chunks_ / layer.kv_heads],
                    static_cast<uint32_t>(i / most_chunks_ % layer.kv_heads),
                    static_cast<uint32_t>(i % most_chunks_));
      });
      phase(
          own, heads,
          [&](size_t i) {
            merge_parts(layer, tiles[i / layer.kv_heads], static_cast<uint32_t>(i % layer.kv_heads),
                        scratch);
          },
          [&] { if_few_tokens(store); });
    } else {
      phase(
          own, heads,
          [&](size_t i) {
            attend_whole(layer, tiles[i / layer.kv_heads],
                         static_cast<uint32_t>(i % layer.kv_heads), scratch);
          },
          [&] { if_few_tokens(store); });
    }
    then_per_token(own, store);
  }

  void attend_whole(const Layer& layer, const QueryTile& tile, uint32_t head, float* scratch) {
    const uint32_t rows = tile.count * (layer.heads / layer.kv_heads);
    const Span span = span_of(layer, tile);
    float *values = scratch, *more = values + kAttentionRows * m_.dim;
    float *largest = more + kAttentionRows * m_.dim, *total = largest + kAttentionRows;
    SoftmaxState states[kAttentionRows] = {};
    for (uint32_t chunk = span.first_chunk; chunk < span.last_chunk; ++chunk) {
      attend_chunk(layer, tile, span, head, chunk, more, largest, total);
      for (uint32_t i = 0; i < rows; ++i) {
        merge(&states[i], values + i * m_.dim, largest[i], total[i], more + i * m_.dim);
      }
    }
    for (uint32_t i = 0; i < rows; ++i) {
      finish_row(layer, tile, head, i, states[i], values + i * m_.dim);
    }
  }

  // Where the results of (tile, head, chunk) begin, in rows.
  size_t part_row(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t chunk) const {
    const uint32_t group = layer.heads / layer.kv_heads;
    return (size_t{chunk} * layer.kv_heads + head) * count_ * group + size_t{tile.row} * group;
  }

  void attend_part(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t chunk) {
    const Span span = span_of(layer, tile);
    if (chunk < span.first_chunk || chunk >= span.last_chunk) return;
    const size_t row = part_row(layer, tile, head, chunk);
    attend_chunk(layer, tile, span, head, chunk, chunk_values_ + row * m_.dim, chunk_largest_ + row,
                 chunk_total_ + row);
  }

  void merge_parts(const Layer& layer, const QueryTile& tile, uint32_t head, float* scratch) {
    const Span span = span_of(layer, tile);
    for (uint32_t i = 0; i < tile.count * (layer.heads / layer.kv_heads); ++i) {
      SoftmaxState state = {};
      for (uint32_t chunk = span.first_chunk; chunk < span.last_chunk; ++chunk) {
        const size_t row = part_row(layer, tile, head, chunk) + i;
        merge(&state, scratch, chunk_largest_[row], chunk_total_[row],
              chunk_values_ + row * m_.dim);
      }
      finish_row(layer, tile, head, i, state, scratch);
    }
  }

  // ---- after attention -----------------------------------------------------------------------

  // With several ranks: adds up all ranks' partial sums, then adds them to the residual.
  void reduce_all() {
    if (m_.reduce.add_up == nullptr) return;
    m_.reduce.add_up(m_.reduce.context, reduced_, count_ * m_.columns);
    for (size_t i = 0; i < count_ * m_.columns; ++i) x_[i] += reduced_[i];
  }

  // Where the outputs of a sublayer are added up: the residual itself if there is one rank.
  void take(size_t token, size_t column, const float* values, size_t n) {
    if (m_.reduce.add_up != nullptr) {
      std::copy_n(values, n, reduced_ + token * m_.columns + column);
      return;
    }
    float* x = x_ + token * m_.columns + column;
    for (size_t i = 0; i < n; ++i) x[i] += values[i];
  }

  void output(const Layer& layer, const Own& own) {
    float* const scratch = own.scratch;
    const auto norm = [&](size_t from, size_t to) {
      norm_tokens(layer.mlp_norm, from, to, own.normed);
    };
    const size_t rows = round_up(m_.hidden, SK_ROW_TILE);
    const size_t inputs = round_up(size_t{layer.heads} * m_.head_dim, SK_COLUMN_TILE);
    phase(
        own, (rows + kOutputRows - 1) / kOutputRows,
        [&](size_t i) {
          const size_t first = i * kOutputRows, count = std::min(kOutputRows, rows - first);
          k_.dot(rows_from(layer.output, first), count, inputs, attention_operand_, count_, scratch,
                 kOutputRows);
          for (size_t t = 0; t < count_; ++t) {
            float* values = scratch + t * kOutputRows;
            if (layer.output_bias != nullptr) {
              for (size_t j = 0; j < count && first + j < m_.hidden; ++j)
                values[j] += layer.output_bias[first + j];
            }
            take(t, first, values, count);
          }
        },
        [&] {
          reduce_all();
          if_few_tokens(norm);
        });
    then_per_token(own, norm);
  }

  // ---- feed-forward --------------------------------------------------------------------------

  // Blocks [first, last) of neurons. What is fetched meanwhile is read next: up after gate, down
  // after up.
  void activate(const Layer& layer, size_t first, size_t last, float* scratch) {
    const size_t row = first * SK_NEURON_BLOCK, rows = (last - first) * SK_NEURON_BLOCK;
    const Rows gate_rows = rows_from(layer.gate, row), up_rows = rows_from(layer.up, row);
    float *gate = scratch, *up = scratch + count_ * rows;
    k_.dot(gate_rows, rows, m_.columns, operand_, count_, gate, rows);
    k_.dot(up_rows, rows, m_.columns, operand_, count_, up, rows);
    const size_t neurons = size_t{layer.blocks} * SK_NEURON_BLOCK;
    for (size_t block = first; block < last; ++block) {
      const size_t at = (block - first) * SK_NEURON_BLOCK;
      k_.swiglu(gate + at, up + at, rows, count_, block, neurons, activations_, plain_, neurons);
    }
  }

  // A partition's part of the down product in some columns.
  void down(const Layer& layer, uint32_t partition, size_t column, size_t columns, float* out,
            bool add) {
    DownTask task = {};
    task.weights = layer.down;
    task.neurons = size_t{layer.blocks} * SK_NEURON_BLOCK;
    task.first_block = layer.partition_begin(partition);
    task.last_block = layer.partition_begin(partition + 1);
    task.first_column = column;
    task.columns = columns;
    task.activations = activations_;
    task.tokens = count_;
    task.out = out;
    task.out_stride = m_.columns;
    task.add = add;
    k_.down(&task);
  }

  void feed_forward(const Layer& layer, size_t index, const Own& own) {
    float* const scratch = own.scratch;
    const float* next =
        index + 1 < m_.layers.size() ? m_.layers[index + 1].attention_norm : nullptr;
    const auto norm = [&](size_t from, size_t to) {
      if (next != nullptr) norm_tokens(next, from, to, own.normed);
    };
    if (fused_) {
      const auto finish = [&](size_t from, size_t to) {
        for (size_t t = from; t < to; ++t) add_partitions(layer, t);
        if (m_.reduce.add_up == nullptr) norm(from, to);
      };
      phase(
          own, layer.partitions,
          [&](size_t p) {
            const uint32_t part = static_cast<uint32_t>(p);
            const size_t begin = layer.partition_begin(part), end = layer.partition_begin(part + 1);
            activate(layer, begin, end, scratch);
            down(layer, part, 0, m_.columns, partial_ + p * count_ * m_.columns, false);
          },
          [&] { if_few_tokens(finish); });
      then_per_token(own, finish);
    } else {
      phase(own, layer.blocks, [&](size_t block) { activate(layer, block, block + 1, scratch); });
      phase(own, (m_.columns + kDownColumns - 1) / kDownColumns, [&](size_t i) {
        const size_t first = i * kDownColumns;
        const size_t n = std::min<size_t>(kDownColumns, m_.columns - first);
        for (uint32_t p = 0; p < layer.partitions; ++p) {
          down(layer, p, first, n, partial_ + first, p != 0);
        }
        for (size_t t = 0; t < count_; ++t) take(t, first, partial_ + t * m_.columns + first, n);
      });
      if (m_.reduce.add_up == nullptr) then_per_token(own, norm);
    }
    if (m_.reduce.add_up != nullptr) {
      phase(own, 1, [&](size_t) { reduce_all(); }, [&] { if_few_tokens(norm); });
      then_per_token(own, norm);
    }
    if (!statistics_.empty()) {
      phase(own, statistics_.size(),
            [&](size_t i) { add_statistics(statistics_[i], layer, index); });
    }
  }

  // The partitions' sums of one token, in order, are added to its residual.
  void add_partitions(const Layer& layer, size_t token) {
    float* total = partial_ + token * m_.columns;
    for (size_t p = 1; p < layer.partitions; ++p) {
      const float* more = partial_ + (p * count_ + token) * m_.columns;
      for (size_t i = 0; i < m_.columns; ++i) total[i] += more[i];
    }
    take(token, 0, total, m_.columns);
  }

  void add_statistics(const StatisticsUnit& unit, const Layer& layer, size_t index) {
    const size_t stride = size_t{layer.blocks} * SK_NEURON_BLOCK;
    for (uint32_t i = 0; i < unit.count; ++i) {
      const float* a = plain_ + (unit.row + i) * stride;
      k_.add_norm_scores(a, layer.neurons, k_.sum_of_squares(a, layer.neurons),
                         unit.sums + index * m_.widest);
    }
  }

  // ---- the end -------------------------------------------------------------------------------

  void head(const Own& own) {
    phase(
        own, args_.num_outputs,
        [&](size_t i) {
          norm_token(m_.norm, args_.output_rows[i], i, output_operand_, own.normed);
        },
        [&] {
          for (size_t i = 0; i < args_.num_hidden; ++i) {
            std::copy_n(x_ + args_.hidden_rows[i] * m_.columns, m_.hidden,
                        args_.hidden + i * m_.hidden);
          }
        });
    if (args_.num_outputs == 0) return;
    phase(own, (m_.vocab + kHeadRows - 1) / kHeadRows, [&](size_t i) {
      head_rows(m_, output_operand_, args_.num_outputs, i, own.scratch, args_.logits);
    });
  }

  void choose(size_t i) {
    const size_t kept = std::min<size_t>(SK_NUM_CANDIDATES, m_.vocab);
    const float* logits = args_.logits + i * m_.vocab;
    choose_candidates(k_, logits, m_.vocab, kept, args_.candidate_ids + i * kept,
                      args_.candidate_logits + i * kept);
    const float top = args_.candidate_logits[i * kept];
    args_.log_normalizers_1[i] =
        static_cast<float>(std::log(k_.sum_of_exp(logits, m_.vocab, top, 1)));
    args_.log_normalizers[i] = args_.temperatures[i] == 1
                                   ? args_.log_normalizers_1[i]
                                   : static_cast<float>(std::log(k_.sum_of_exp(
                                         logits, m_.vocab, top, 1 / args_.temperatures[i])));
  }

 public:
  // Rows [kHeadRows unit, ...) of the LM head for `count` inputs -> logits [count, vocab].
  static void head_rows(const Model& m, const void* operand, size_t count, size_t unit,
                        float* scratch, float* logits) {
    const size_t first = unit * kHeadRows;
    const size_t rows = std::min<size_t>(kHeadRows, round_up(m.vocab - first, SK_ROW_TILE));
    const bool whole = first + rows <= m.vocab;  // nothing beyond a row of logits may be written
    float* out = whole ? logits + first : scratch;
    const size_t stride = whole ? m.vocab : kHeadRows;
    m.kernels->dot(rows_from(m.lm_head, first), rows, m.columns, operand, count, out, stride);
    if (whole) return;
    for (size_t i = 0; i < count; ++i) {
      std::copy_n(scratch + i * stride, m.vocab - first, logits + i * m.vocab + first);
    }
  }

 private:
  Model& m_;
  const Kernels& k_;
  const sk_forward_args& args_;

  std::vector<Token> tokens_;  // rows of the batch
  size_t count_ = 0;           // of them
  bool fused_ = false;
  std::vector<std::vector<QueryTile>> tiles_;  // by heads per KV head
  std::vector<StatisticsUnit> statistics_;
  bool split_ = false;
  size_t most_chunks_ = 0;

  float *x_ = nullptr, *queries_ = nullptr, *mixed_ = nullptr, *partial_ = nullptr;
  float *plain_ = nullptr, *reduced_ = nullptr, *cos_ = nullptr, *sin_ = nullptr;
  float *chunk_values_ = nullptr, *chunk_largest_ = nullptr, *chunk_total_ = nullptr;
  void *operand_ = nullptr, *attention_operand_ = nullptr, *activations_ = nullptr;
  void* output_operand_ = nullptr;

  std::vector<Range> ranges_;  // of each thread
  Clock::time_point mark_;
};

// ---- what comes in is checked ------------------------------------------------------------------

int32_t check_sequence(const Model& model, const sk_forward_args& args, uint32_t index) {
  const sk_sequence& sequence = args.sequences[index];
  if (const int32_t status = check_struct(&sequence, "sk_sequence")) return status;
  if (sequence.token_ids == nullptr || sequence.block_table == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "sequence %" PRIu32 ": token_ids or block_table is null",
                index);
  }
  if (sequence.num_tokens < 1 || sequence.num_tokens > SK_MAX_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " has %" PRIu32 " tokens; it can have 1 to %d", index,
                sequence.num_tokens, SK_MAX_TOKENS);
  }
  const uint64_t end = uint64_t{sequence.start} + sequence.num_tokens;
  if (end > SK_MAX_POSITIONS || end > uint64_t{sequence.num_blocks} * SK_BLOCK_SIZE) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " ends at position %" PRIu64 ", beyond its %" PRIu32
                " KV blocks of %d",
                index, end, sequence.num_blocks, SK_BLOCK_SIZE);
  }
  for (uint32_t i = 0; i < sequence.num_tokens; ++i) {
    if (sequence.token_ids[i] < 0 || static_cast<uint32_t>(sequence.token_ids[i]) >= model.vocab) {
      return fail(SK_STATUS_BAD_VALUE,
                  "sequence %" PRIu32 " has the token id %" PRId32 "; the vocabulary has %" PRIu32,
                  index, sequence.token_ids[i], model.vocab);
    }
  }
  const uint64_t blocks = (end + SK_BLOCK_SIZE - 1) / SK_BLOCK_SIZE;
  for (uint64_t i = 0; i < blocks; ++i) {
    if (sequence.block_table[i] < 0 ||
        static_cast<uint32_t>(sequence.block_table[i]) >= args.kv_num_blocks) {
      return fail(SK_STATUS_BAD_VALUE,
                  "sequence %" PRIu32 " has the KV block %" PRId32 "; there are %" PRIu32, index,
                  sequence.block_table[i], args.kv_num_blocks);
    }
  }
  const uint64_t touched = blocks - sequence.start / SK_BLOCK_SIZE;
  if (sequence.statistics != nullptr ? sequence.statistics_blocks != touched
                                     : sequence.statistics_blocks != 0) {
    return fail(SK_STATUS_BAD_SIZE,
                "sequence %" PRIu32 " has statistics_blocks %" PRIu32 "; its tokens touch %" PRIu64
                " blocks, and without statistics it is 0",
                index, sequence.statistics_blocks, touched);
  }
  return SK_STATUS_OK;
}

int32_t check_rows(const char* name, const uint32_t* rows, uint32_t count, uint64_t tokens) {
  if (count != 0 && rows == nullptr) return fail(SK_STATUS_NULL_POINTER, "%s is null", name);
  for (uint32_t i = 0; i < count; ++i) {
    if (rows[i] >= tokens) {
      return fail(SK_STATUS_BAD_VALUE, "%s has row %" PRIu32 "; the batch has %" PRIu64 " tokens",
                  name, rows[i], tokens);
    }
  }
  return SK_STATUS_OK;
}

int32_t check_count(const char* name, uint64_t found, uint64_t wanted) {
  if (found == wanted) return SK_STATUS_OK;
  return fail(SK_STATUS_BAD_SIZE, "%s is %" PRIu64 ", it must be %" PRIu64, name, found, wanted);
}

int32_t check_outputs(const Model& model, const sk_forward_args& args, uint64_t tokens) {
  if (args.num_outputs > tokens || args.num_hidden > tokens) {
    return fail(SK_STATUS_BAD_SIZE,
                "num_outputs is %" PRIu32 " and num_hidden %" PRIu32 "; the batch has %" PRIu64
                " tokens",
                args.num_outputs, args.num_hidden, tokens);
  }
  if (const int32_t s = check_rows("output_rows", args.output_rows, args.num_outputs, tokens))
    return s;
  if (const int32_t s = check_rows("hidden_rows", args.hidden_rows, args.num_hidden, tokens))
    return s;
  const uint64_t outputs = args.num_outputs,
                 kept = std::min<uint64_t>(SK_NUM_CANDIDATES, model.vocab);
  if (const int32_t s = check_count("logits_count", args.logits_count, outputs * model.vocab))
    return s;
  if (const int32_t s = check_count("candidates_count", args.candidates_count, outputs * kept))
    return s;
  if (const int32_t s = check_count("hidden_count", args.hidden_count,
                                    uint64_t{args.num_hidden} * model.hidden)) {
    return s;
  }
  if (args.num_hidden != 0 && args.hidden == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "hidden is null");
  }
  if (outputs == 0) return SK_STATUS_OK;
  if (args.logits == nullptr || args.candidate_ids == nullptr || args.candidate_logits == nullptr ||
      args.log_normalizers == nullptr || args.log_normalizers_1 == nullptr ||
      args.temperatures == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "temperatures or a result of num_outputs rows is null");
  }
  for (uint32_t i = 0; i < args.num_outputs; ++i) {
    if (!(args.temperatures[i] > 0 && std::isfinite(args.temperatures[i]))) {
      return fail(SK_STATUS_BAD_VALUE, "temperature %g of row %" PRIu32 " must be finite and > 0",
                  static_cast<double>(args.temperatures[i]), i);
    }
  }
  return SK_STATUS_OK;
}

int32_t check_forward(const Model& model, const sk_forward_args& args) {
  if (args.sequences == nullptr || args.kv == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "sequences or kv is null");
  }
  if (args.num_sequences < 1 || args.num_sequences > SK_MAX_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE, "num_sequences is %" PRIu32 "; it can be 1 to %d",
                args.num_sequences, SK_MAX_TOKENS);
  }
  const uint64_t block_bytes = model.kv_elements * sizeof(uint16_t);
  if (args.kv_num_blocks < 1 || args.kv_num_blocks > INT32_MAX ||
      args.kv_bytes / block_bytes < args.kv_num_blocks) {
    return fail(SK_STATUS_BAD_SIZE,
                "kv has %" PRIu64 " bytes; %" PRIu32 " blocks of %" PRIu64 " bytes do not fit",
                args.kv_bytes, args.kv_num_blocks, block_bytes);
  }
  if (reinterpret_cast<uintptr_t>(args.kv) % SK_ALIGNMENT != 0) {
    return fail(SK_STATUS_BAD_VALUE, "kv is not aligned to %d bytes", SK_ALIGNMENT);
  }
  uint64_t tokens = 0;
  for (uint32_t i = 0; i < args.num_sequences; ++i) {
    if (const int32_t status = check_sequence(model, args, i)) return status;
    tokens += args.sequences[i].num_tokens;
  }
  if (tokens > SK_MAX_TOKENS) {
    return fail(SK_STATUS_BAD_SIZE, "the batch has %" PRIu64 " tokens; it can have 1 to %d", tokens,
                SK_MAX_TOKENS);
  }
  return check_outputs(model, args, tokens);
}

// The LM head on hidden states from outside.
class Head {
 public:
  Head(Model& model, const sk_logits_args& args) : m_(model), args_(args) {
    operand_ = m_.output_operand.get(m_.kernels->operand_bytes(args.rows, m_.columns));
    for (Scratch& scratch : m_.scratch) scratch.get<float>(args.rows * kHeadRows + m_.columns);
  }

  void run() {
    m_.pool.run([](void* self, uint32_t index) { static_cast<Head*>(self)->work(index); }, this);
  }

 private:
  void work(uint32_t index) {
    const Kernels& kernels = *m_.kernels;
    float* normed = m_.scratch[index].get<float>(0);
    kernels.begin_thread();
    for (size_t i = index; i < args_.rows; i += m_.pool.threads()) {
      kernels.rms_norm(args_.hidden + i * m_.hidden, m_.norm, m_.hidden, m_.eps, normed);
      kernels.store_operand(normed, m_.hidden, m_.columns, i, operand_);
    }
    m_.barrier.arrive_and_wait([] {});
    for (;;) {
      const size_t unit = next_unit_.fetch_add(1, std::memory_order_relaxed);
      if (unit * kHeadRows >= m_.vocab) break;
      Forward::head_rows(m_, operand_, args_.rows, unit, normed + m_.columns, args_.logits);
    }
    kernels.end_thread();
  }

  Model& m_;
  const sk_logits_args& args_;
  void* operand_;
  std::atomic<size_t> next_unit_{0};
};

int32_t check_logits(const Model& model, const sk_logits_args& args) {
  if (args.rows < 1 || args.rows > SK_MAX_TOKENS || args.reserved != 0) {
    return fail(SK_STATUS_BAD_SIZE, "rows is %" PRIu32 "; it can be 1 to %d, and reserved is 0",
                args.rows, SK_MAX_TOKENS);
  }
  if (const int32_t s =
          check_count("hidden_count", args.hidden_count, uint64_t{args.rows} * model.hidden))
    return s;
  if (const int32_t s =
          check_count("logits_count", args.logits_count, uint64_t{args.rows} * model.vocab))
    return s;
  if (args.hidden == nullptr || args.logits == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "hidden or logits is null");
  }
  return SK_STATUS_OK;
}

}  // namespace
}  // namespace sk

int32_t sk_forward(uint64_t handle, const sk_forward_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_forward_args")) return status;
  return sk::guarded([&]() -> int32_t {
    const std::shared_ptr<sk::Model> model = sk::find_model(handle);
    if (model == nullptr) return SK_STATUS_BAD_VALUE;
    if (const int32_t status = sk::check_forward(*model, *args)) return status;
    const std::lock_guard<std::mutex> one_at_a_time(model->mutex);
    sk::Forward(*model, *args).run();
    return SK_STATUS_OK;
  });
}

int32_t sk_logits(uint64_t handle, const sk_logits_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_logits_args")) return status;
  return sk::guarded([&]() -> int32_t {
    const std::shared_ptr<sk::Model> model = sk::find_model(handle);
    if (model == nullptr) return SK_STATUS_BAD_VALUE;
    if (const int32_t status = sk::check_logits(*model, *args)) return status;
    const std::lock_guard<std::mutex> one_at_a_time(model->mutex);
    sk::Head(*model, *args).run();
    return SK_STATUS_OK;
  });
}
