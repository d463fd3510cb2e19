#include "forward.hpp"

#include <cfloat>
#include <cmath>
#include <new>

#include "candidates.hpp"
#include "head.hpp"
#include "low_rank.hpp"

namespace sk {
namespace {

constexpr size_t kUpcomingBytes = 192 << 10;  // a part of the second-level cache

constexpr size_t kFusedTokens = 16;  // feed-forward in one phase, with partial sums per partition
constexpr size_t kOutputRows = 32;   // rows of the attention's output projection in a unit

}  // namespace

Forward::Forward(Model& model, const sk_forward_args& args)
    : m_(model), k_(*model.kernels), args_(args), ranges_(model.pool.threads()) {
  lay_out();
  allocate();
}

void Forward::run() {
  if (args_.phase_seconds != nullptr) {
    std::fill_n(args_.phase_seconds, SK_NUM_PHASES, 0.0);
    mark_ = Clock::now();
  }
  for (size_t i = 0; args_.union_reads != nullptr && i < m_.layers.size() * kReadKinds; ++i) {
    args_.union_reads[i] = choosing_ ? 0 : m_.layers[i / kReadKinds].neurons;
  }
  m_.pool.run([](void* self, uint32_t index) { static_cast<Forward*>(self)->work(index); }, this);
  if (out_of_memory_ || (scan_ && scan_->out_of_memory())) throw std::bad_alloc();
}

void Forward::lay_out() {
  for (uint32_t s = 0; s < args_.num_sequences; ++s) {
    const sk_sequence& sequence = args_.sequences[s];
    const uint32_t row = static_cast<uint32_t>(tokens_.size());
    for (uint32_t i = 0; i < sequence.num_tokens; ++i) {
      tokens_.push_back({sequence.token_ids[i], sequence.start + i, &sequence, s});
    }
    if (sequence.choice != nullptr) {
      choosing_ = true;
      corrected_ = corrected_ || sequence.choice->correction != 0;
    }
    if (sequence.statistics != nullptr) lay_out_statistics(sequence, row);
  }
  count_ = tokens_.size();
  fused_ = count_ <= kFusedTokens;
  copied_ = fused_ && choosing_ && m_.core_copy.wanted() && take_copy();
}

bool Forward::take_copy() {
  std::vector<uint64_t> cores(m_.layers.size() * m_.words, 0);
  for (uint32_t s = 0; s < args_.num_sequences; ++s) {
    const sk_choice* const choice = args_.sequences[s].choice;
    if (choice == nullptr || choice->kind != SK_CHOICE_CORE || choice->core == nullptr) {
      return false;
    }
    for (size_t i = 0; i < cores.size(); ++i) cores[i] |= choice->core[i];
  }
  for (size_t i = 0; i < cores.size(); ++i) {
    cores[i] &= m_.layers[i / m_.words].members(i % m_.words);
  }
  return m_.core_copy.take(m_, ranges_.size(), std::move(cores));
}

void Forward::lay_out_statistics(const sk_sequence& sequence, uint32_t first_row) {
  const size_t block_sums = m_.layers.size() * m_.widest;
  const uint32_t end = sequence.start + sequence.num_tokens;
  const uint32_t first_block = sequence.start / SK_BLOCK_SIZE;
  for (uint32_t block = first_block; block * SK_BLOCK_SIZE < end; ++block) {
    // The attention sink, position 0, counts nowhere.
    const uint32_t from = std::max({block * SK_BLOCK_SIZE, sequence.start, 1u});
    const uint32_t to = std::min((block + 1) * SK_BLOCK_SIZE, end);
    if (from >= to) continue;
    statistics_.push_back({&sequence, first_row + from - sequence.start, to - from,
                           sequence.statistics + (block - first_block) * block_sums});
  }
}

std::vector<QueryTile> Forward::query_tiles(uint32_t group) const {
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

void Forward::allocate() {
  const size_t t = count_, columns = m_.columns;
  size_t mixed_columns = 0, down_columns = 0, low_rank = 0;  // the last: floats of scratch
  const size_t neurons = round_up(m_.widest, SK_NEURON_BLOCK);
  size_t partitions = 0, most_blocks = 0;                      // of a partition
  size_t operand = 0, attention_operand = 0, activations = 0;  // bytes
  const auto operand_bytes = [&](const Matrix& matrix) {
    return products(matrix).operand_bytes(&matrix, t);
  };
  for (const Layer& layer : m_.layers) {
    operand = std::max({operand, operand_bytes(layer.qkv), operand_bytes(layer.gate)});
    attention_operand = std::max(attention_operand, operand_bytes(layer.output));
    activations = std::max(activations, products(layer.down).activation_bytes(t, neurons));
    input_stride_ = std::max<size_t>({input_stride_, layer.qkv.columns, layer.gate.columns});
    mixed_columns = std::max<size_t>(mixed_columns, layer.output.columns);
    down_columns = std::max<size_t>(down_columns, layer.down.columns);
    low_rank =
        std::max({low_rank, low_rank_floats(layer.qkv_basis), low_rank_floats(layer.output_basis),
                  low_rank_floats(layer.gate_up_basis)});
    partitions = std::max<size_t>(partitions, layer.partitions);
    most_blocks = std::max<size_t>(most_blocks, layer.blocks / layer.partitions + 1);
    const uint32_t group = layer.heads / layer.kv_heads;
    if (tiles_.size() <= group) tiles_.resize(group + 1);
    if (tiles_[group].empty()) tiles_[group] = query_tiles(group);
  }
  x_ = m_.x.get<float>(t * columns);
  operand_ = m_.operand.get(operand);
  attention_operand_ = m_.attention_operand.get(attention_operand);
  queries_ = m_.queries.get<float>(t * m_.most_heads * m_.dim);
  mixed_ = m_.mixed.get<float>(t * mixed_columns);
  partial_ = m_.partial.get<float>((fused_ ? partitions + corrected_ : 1) * t * down_columns);
  activations_ = m_.activations.get(activations);
  if (!statistics_.empty()) plain_ = m_.plain.get<float>(t * neurons);
  if (m_.reduce.add_up != nullptr) reduced_ = m_.reduced.get<float>(t * columns);
  cos_ = m_.cos.get<float>(t * (m_.head_dim / 2));
  sin_ = m_.sin.get<float>(t * (m_.head_dim / 2));
  split_attention();
  if (args_.num_outputs != 0) {
    output_operand_ =
        m_.output_operand.get(m_.lm_head.products->operand_bytes(&m_.lm_head, args_.num_outputs));
  }
  if (corrected_) {
    Matrix shape = {};
    shape.columns = m_.columns;
    correction_operand_ = m_.correction_operand.get(k_.bfloat16.operand_bytes(&shape, t));
  }
  if (choosing_) {
    size_t groups = 0;
    for (const Layer& layer : m_.layers) groups = std::max<size_t>(groups, layer.gate.groups);
    squares_ = m_.squares.get<float>(t * groups);
    used_.resize(m_.words);
    coarse_.resize(m_.words * t);
    reads_.assign(ranges_.size() * reads_stride(), 0);
  }
  if (Scan::wanted(m_, args_)) scan_.emplace(m_, args_);
  const size_t rows = std::max<size_t>(t, args_.num_outputs);
  const size_t per_token = std::max<size_t>(
      std::max<size_t>(2 * SK_NEURON_BLOCK * (fused_ ? std::max<size_t>(most_blocks, 2) : 1),
                       m_.dim),
      kOutputRows);
  size_t chosen = choosing_ ? 4 * kChosenBlocks * SK_NEURON_BLOCK : 0;  // see activate_chosen
  if (copied_) chosen = std::max<size_t>(chosen, 2 * m_.core_copy.most_rows());
  const size_t floats =
      std::max(rows * std::max(per_token, chosen), args_.num_outputs * kHeadRows) +
      kAttentionRows * m_.dim * 2 + 4 * kAttentionRows;
  const size_t most =
      std::max({floats, Scan::scratch_floats(m_), neurons /* counted scores */, low_rank});
  for (Scratch& scratch : m_.scratch) scratch.get<float>(kTokenUnit * input_stride_ + most);
}

void Forward::split_attention() {
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

Upcoming Forward::share_of(const Matrix& matrix, size_t rows, const Own& own) const {
  const size_t threads = ranges_.size();
  const size_t begin = rows * own.index / threads, end = rows * (own.index + 1) / threads;
  const size_t bytes = (end - begin) * matrix.stride;
  const char* at = reinterpret_cast<const char*>(matrix.codes + begin * matrix.stride);
  return {at, at + std::min(bytes, kUpcomingBytes)};
}

Upcoming Forward::gate_share(const Layer& layer, size_t index, const Own& own) const {
  if (!is_copied(index)) return share_of(layer.gate, size_t{layer.blocks} * SK_NEURON_BLOCK, own);
  const CopiedLayer& copy = m_.core_copy.layer(index);
  return share_of(copy.gate, copy.rows, own);
}

Upcoming Forward::next_share(size_t layer, const Own& own) const {
  if (layer + 1 == m_.layers.size()) {
    return share_of(scan_ ? m_.scan.matrix : m_.lm_head, m_.vocab, own);
  }
  const Layer& next = m_.layers[layer + 1];
  return share_of(next.qkv, (next.heads + 2 * next.kv_heads) * m_.dim, own);
}

void Forward::tick(sk_phase phase, uint32_t index) {
  if (index != 0 || args_.phase_seconds == nullptr) return;
  const Clock::time_point now = Clock::now();
  args_.phase_seconds[phase] += std::chrono::duration<double>(now - mark_).count();
  mark_ = now;
}

void Forward::work(uint32_t index) {
  k_.begin_thread();
  float* memory = m_.scratch[index].get<float>(0);
  const Own own = {index, memory, memory + kTokenUnit * input_stride_};
  const auto begin = [&](size_t from, size_t to) {
    embed(from, to);
    const Layer& layer = m_.layers[0];
    norm_tokens(layer.attention_norm, layer.qkv, layer.qkv_basis, from, to, own);
  };
  if (copied_ && m_.core_copy.stale()) {
    phase(
        own, m_.core_copy.pieces(), [&](size_t i) { m_.core_copy.copy(m_, i); },
        [&] { m_.core_copy.copied(); });
  }
  phase(own, 1, [&](size_t) { if_few_tokens(begin); });
  then_per_token(own, begin);
  for (size_t i = 0; i < m_.layers.size(); ++i) {
    const Layer& layer = m_.layers[i];
    project(layer, own);
    tick(SK_PHASE_QKV, index);
    attend(layer, own);
    tick(SK_PHASE_ATTENTION, index);
    output(layer, i, own);
    tick(SK_PHASE_OUTPUT, index);
    feed_forward(layer, i, own);
    tick(SK_PHASE_MLP, index);
  }
  const bool scanned = scan(own);
  if (!scanned) head(own);
  tick(SK_PHASE_HEAD, index);
  phase(own, args_.num_outputs, [&](size_t i) { scanned ? scan_->finish(i) : choose(i); });
  tick(SK_PHASE_CANDIDATES, index);
  k_.end_thread();
}

void Forward::embed(size_t from, size_t to) {
  const size_t half = m_.head_dim / 2;
  for (size_t t = from; t < to; ++t) {
    const Token& token = tokens_[t];
    float* x = x_ + t * m_.columns;
    k_.embed(m_.embedding.codes + static_cast<size_t>(token.id) * m_.embedding.stride, m_.hidden,
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

void Forward::norm_tokens(const float* weight, const Matrix& matrix, const Matrix& basis,
                          size_t from, size_t to, const Own& own) {
  for (size_t t = from; t < to; ++t) {
    k_.rms_norm(x_ + t * m_.columns, weight, m_.hidden, m_.eps,
                own.normed + (t - from) * input_stride_);
  }
  store_inputs(matrix, basis, m_.hidden, from, to, own.normed, input_stride_, operand_, own);
}

size_t Forward::low_rank_floats(const Matrix& basis) const {
  if (basis.columns == 0) return 0;
  return k_.bfloat16.operand_bytes(&basis, kTokenUnit) / sizeof(float) + kTokenUnit * SK_MAX_RANK;
}

void Forward::store_inputs(const Matrix& matrix, const Matrix& basis, size_t n, size_t from,
                           size_t to, float* inputs, size_t stride, void* operand, const Own& own) {
  const size_t count = to - from;
  if (matrix.rank != 0) {
    float *const u = own.scratch, *const plain = u + kTokenUnit * SK_MAX_RANK;
    for (size_t i = 0; i < count; ++i) {
      k_.bfloat16.store_operand(&basis, inputs + i * stride, n, i, count, plain);
    }
    k_.bfloat16.dot(&basis, 0, matrix.rank, plain, count, u, matrix.rank);
    for (size_t i = 0; i < count; ++i) {
      put_factor_inputs(matrix, u + i * matrix.rank, n, inputs + i * stride);
    }
    n = matrix.columns;
  }
  for (size_t i = 0; i < count; ++i) {
    products(matrix).store_operand(&matrix, inputs + i * stride, n, from + i, count_, operand);
  }
}

void Forward::store_for_choices(const Layer& layer, size_t from, size_t to, const Own& own) {
  for (size_t t = from; t < to; ++t) {
    const float* const normed = own.normed + (t - from) * input_stride_;
    if (corrected_) {
      Matrix shape = {};
      shape.columns = m_.columns;
      k_.bfloat16.store_operand(&shape, normed, m_.hidden, t, count_, correction_operand_);
    }
    if (!layer.planes_factors.empty()) {
      float* const squares = squares_ + t * layer.gate.groups;
      std::fill_n(squares, layer.gate.groups, 0.0f);
      k_.group_squares(normed, m_.hidden, layer.gate.group, squares);
      k_.group_squares(normed + layer.gate.factors, layer.gate.columns - layer.gate.factors,
                       layer.gate.group, squares + layer.gate.factors / layer.gate.group);
    }
  }
}

void Forward::project(const Layer& layer, const Own& own) {
  float* const scratch = own.scratch;
  const size_t heads = layer.heads + 2 * layer.kv_heads;
  phase(
      own, heads,
      [&](size_t head) {
        fetch_basis(layer.output, layer.output_basis, head, heads, own);
        const uint32_t group = layer.heads / layer.kv_heads;
        const bool is_query = head < layer.heads,
                   is_key = !is_query && head < layer.heads + layer.kv_heads;
        HeadTask task = {};
        task.tokens = static_cast<uint32_t>(count_);
        task.head_dim = m_.head_dim;
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
        products(layer.qkv).dot(&layer.qkv, first, m_.dim, operand_, count_, task.heads,
                                task.stride);
        k_.finish_heads(&task);
        if (!is_query)
          append(layer, static_cast<uint32_t>((head - layer.heads) % layer.kv_heads), is_key,
                 scratch);
      },
      [] {}, output_share(layer, own));
}

void Forward::append(const Layer& layer, uint32_t head, bool is_key, const float* heads) {
  for (size_t t = 0; t < count_; ++t) {
    const Token& token = tokens_[t];
    const int32_t block = token.sequence->block_table[token.position / SK_BLOCK_SIZE];
    const auto store = is_key ? m_.kv->append_key : m_.kv->append_value;
    store(heads + t * m_.dim, m_.dim, token.position % SK_BLOCK_SIZE, kv_block(layer, block, head));
  }
}

uint8_t* Forward::kv_block(const Layer& layer, int32_t block, uint32_t head) const {
  return static_cast<uint8_t*>(args_.kv) + layer.kv_offset * args_.kv_num_blocks +
         (static_cast<size_t>(block) * layer.kv_heads + head) * m_.kv_head_bytes;
}

void Forward::output(const Layer& layer, size_t index, const Own& own) {
  float* const scratch = own.scratch;
  const auto norm = [&](size_t from, size_t to) {
    norm_tokens(layer.mlp_norm, layer.gate, layer.gate_up_basis, from, to, own);
    if (choosing_) store_for_choices(layer, from, to, own);
  };
  const size_t rows = round_up(m_.hidden, SK_ROW_TILE);
  const size_t units = (rows + kOutputRows - 1) / kOutputRows;
  phase(
      own, units,
      [&](size_t i) {
        fetch_basis(layer.gate, layer.gate_up_basis, i, units, own);
        const size_t first = i * kOutputRows, count = std::min(kOutputRows, rows - first);
        products(layer.output)
            .dot(&layer.output, first, count, attention_operand_, count_, scratch, kOutputRows);
        for (size_t t = 0; t < count_; ++t) {
          take(t, first, layer.output_bias, scratch + t * kOutputRows, count);
        }
      },
      [&] {
        reduce_all();
        if_few_tokens(norm);
      },
      gate_share(layer, index, own));
  then_per_token(own, norm);
}

void Forward::reduce_all() {
  if (m_.reduce.add_up == nullptr) return;
  m_.reduce.add_up(m_.reduce.context, reduced_, count_ * m_.columns);
  for (size_t i = 0; i < count_ * m_.columns; ++i) x_[i] += reduced_[i];
}

void Forward::take(size_t token, size_t column, const float* bias, float* values, size_t n) {
  if (bias != nullptr) {
    for (size_t i = 0; i < n && column + i < m_.hidden; ++i) values[i] += bias[column + i];
  }
  if (m_.reduce.add_up != nullptr) {
    std::copy_n(values, n, reduced_ + token * m_.columns + column);
    return;
  }
  float* x = x_ + token * m_.columns + column;
  for (size_t i = 0; i < n; ++i) x[i] += values[i];
}

void Forward::copy_hidden() {
  for (size_t i = 0; i < args_.num_hidden; ++i) {
    std::copy_n(x_ + size_t{args_.hidden_rows[i]} * m_.columns, m_.hidden,
                args_.hidden + i * m_.hidden);
  }
}

bool Forward::scan(const Own& own) {
  if (!scan_) return false;
  phase(
      own, args_.num_outputs,
      [&](size_t i) {
        const float* x = x_ + size_t{args_.output_rows[i]} * m_.columns;
        k_.rms_norm(x, m_.norm, m_.hidden, m_.eps, own.normed);
        scan_->prepare(i, own.normed, own.scratch);
      },
      [&] { copy_hidden(); });
  phase(own, head_units(m_), [&](size_t unit) { scan_->multiply(unit, own.scratch); });
  phase(own, args_.num_outputs, [&](size_t i) { scan_->pick(i); }, [&] { scan_->plan(); });
  phase(own, scan_->tiles(), [&](size_t tile) { scan_->rescore(tile, own.scratch); });
  phase(own, args_.num_outputs, [&](size_t i) { scan_->collect(i); }, [&] { scan_->plan(); });
  if (!scan_->worthwhile()) return false;
  phase(own, scan_->tiles(), [&](size_t tile) { scan_->rescore(tile, own.scratch); });
  return true;
}

void Forward::head(const Own& own) {
  phase(
      own, args_.num_outputs,
      [&](size_t i) {
        const float* x = x_ + size_t{args_.output_rows[i]} * m_.columns;
        k_.rms_norm(x, m_.norm, m_.hidden, m_.eps, own.normed);
        m_.lm_head.products->store_operand(&m_.lm_head, own.normed, m_.hidden, i, args_.num_outputs,
                                           output_operand_);
      },
      [&] { copy_hidden(); });
  if (args_.num_outputs == 0) return;
  phase(own, head_units(m_), [&](size_t i) {
    head_rows(m_, m_.lm_head, output_operand_, args_.num_outputs, i, own.scratch, args_.logits);
  });
}

void Forward::choose(size_t i) noexcept {
  if (args_.needed != nullptr) args_.rescored[i] = m_.vocab;
  const size_t kept = std::min<size_t>(SK_NUM_CANDIDATES, m_.vocab);
  const float* logits = args_.logits + i * m_.vocab;
  try {
    choose_candidates(k_, logits, m_.vocab, kept, args_.candidate_ids + i * kept,
                      args_.candidate_logits + i * kept);
  } catch (const std::bad_alloc&) {
    out_of_memory_ = true;
    return;
  }
  const float top = args_.candidate_logits[i * kept], temperature = args_.temperatures[i];
  args_.log_normalizers_1[i] =
      static_cast<float>(std::log(k_.sum_of_exp(logits, m_.vocab, top, 1)));
  // Infinity times the distance 0 of the largest would not be a number.
  const float factor = std::min(1 / temperature, FLT_MAX);
  args_.log_normalizers[i] =
      temperature == 1 ? args_.log_normalizers_1[i]
                       : static_cast<float>(std::log(k_.sum_of_exp(logits, m_.vocab, top, factor)));
}

}  // namespace sk
