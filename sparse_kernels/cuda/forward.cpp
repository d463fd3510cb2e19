#include "forward.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"

namespace sk {
namespace cuda {
namespace {

constexpr size_t kChunkBytes =
    64 << 20;  // of attention's partial results, unless one row needs more

uint32_t blocks_of(uint32_t count, uint32_t unit) { return (count + unit - 1) / unit; }

const char* format_of(const Weights& weights) {
  if (weights.bits == 16) return "bfloat16";
  if (weights.low_bits != 0) return "planes";
  return weights.bits == 8 ? "int8" : "int4";
}

// A code of 4 bits in all: a factor of a low-rank term is in two of them.
uint32_t in_halves(const Weights& weights) { return weights.bits + weights.low_bits == 4; }

Operand operand_in(const Model& model, const Weights& of) {
  const Buffers& b = model.buffers;
  return {b.halves, uint64_t{of.columns} * (of.bits == 16 ? 2 : 1), b.operand_scales,
          b.operand_offsets, of.groups};
}

// The row `rows` of an operand and what else belongs to it stand at the beginning.
Operand from_row(Operand operand, uint32_t row) {
  operand.halves += 2 * uint64_t{row} * operand.stride;
  operand.scales += size_t{row} * operand.groups;
  operand.offsets += size_t{row} * operand.groups;
  return operand;
}

void put_operand(const Model& model, const Weights& of, const Basis& basis, PrepareArgs* args) {
  args->operand = operand_in(model, of);
  args->columns = of.columns;
  args->group = of.group;
  args->groups = of.groups;
  args->activation_bits = model.shape.activation_bits;
  args->rank = of.rank;
  args->factors = of.factors;
  args->halves = in_halves(of);
  args->basis = basis.rows;
  args->basis_stride = basis.stride;
}

PrepareArgs prepare_of(const Model& model, uint32_t source, uint32_t rows) {
  PrepareArgs args = {};
  args.source = source;
  args.rows = rows;
  args.size = model.shape.hidden;
  args.x = model.buffers.x;
  args.x_stride = model.shape.hidden;
  args.eps = model.shape.eps;
  args.normed = model.buffers.normed;
  args.normed_stride = model.normed_stride;
  return args;
}

int32_t multiply(Model& model, const Weights& weights, uint32_t rows, uint32_t valid, float* out,
                 uint32_t out_stride, bool add, const float* bias) {
  DotArgs args = {};
  args.weights = weights;
  args.operand = operand_in(model, weights);
  args.rows = rows;
  args.valid = valid;
  args.out = out;
  args.out_stride = out_stride;
  args.add = add;
  args.bias = bias;
  uint32_t tiles;
  const std::string kernel = kernel_for("dot", weights, rows, &tiles);
  return launch(model.device, model.stream, kernel.c_str(), {weights.rows / SK_ROW_TILE, tiles, 1},
                &args, sizeof(args));
}

}  // namespace

std::string kernel_for(const char* name, const Weights& weights, uint32_t rows, uint32_t* blocks) {
  const uint32_t tiles = rows <= kTokensOfTile ? 1 : rows <= 4 * kTokensOfTile ? 4 : 8;
  *blocks = blocks_of(rows, tiles * kTokensOfTile);
  return std::string(name) + "_" + format_of(weights) + "_" + std::to_string(tiles);
}

int32_t head_logits(Model& model, const uint32_t* row_list, uint32_t rows) {
  PrepareArgs args = prepare_of(model, kFromResidual, rows);
  args.row_list = row_list;
  args.norm = model.norm;
  put_operand(model, model.lm_head, {}, &args);
  SK_TRY(launch(model.device, model.stream, "prepare", {rows, 1, 1}, &args, sizeof(args)));
  return multiply(model, model.lm_head, rows, model.shape.vocab, model.buffers.logits,
                  model.shape.vocab, false, nullptr);
}

Pass::Pass(Model& model, const sk_forward_args& args, PassRows rows)
    : m_(model), args_(args), shape_(model.shape), rows_(rows), step_(model) {}

int32_t Pass::run() {
  mark_ = Clock::now();
  lay_out();
  SK_TRY(reserve_chunks());
  SK_TRY(reserve_results());
  SK_TRY(send());
  SK_TRY(embed());
  for (uint32_t i = 0; i < m_.layers.size(); ++i) SK_TRY(layer(i));
  return end();
}

void Pass::lay_out() {
  uint32_t row = 0;
  const uint32_t last = rows_.first + rows_.count;
  for (uint32_t s = 0; s < args_.num_sequences; ++s) {
    const sk_sequence& sequence = args_.sequences[s];
    const uint32_t begin = std::max(row, rows_.first);
    const uint32_t end = std::min(row + sequence.num_tokens, last);
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t token = i - row, position = sequence.start + token;
      tokens_.push_back({sequence.token_ids[token], position, s, row});
      most_chunks_ = std::max(most_chunks_, position / kChunk + 1);
    }
    if (begin < end && sequence.statistics != nullptr) {
      lay_out_statistics(s, begin - row, end - row);
    }
    if (sequence.choice != nullptr) {
      choosing_ = true;
      planes_ = planes_ || sequence.choice->kind == SK_CHOICE_PLANES;
      if (sequence.choice->correction != 0) corrections_.resize(m_.layers.size());
    }
    row += sequence.num_tokens;
  }
  const auto take = [&](const uint32_t* all, uint32_t count, std::vector<uint32_t>* own,
                        std::vector<uint32_t>* places) {
    for (uint32_t i = 0; i < count; ++i) {
      if (all[i] < rows_.first || all[i] >= last) continue;
      own->push_back(all[i] - rows_.first);
      places->push_back(i);
    }
  };
  take(args_.output_rows, args_.num_outputs, &outputs_, &output_places_);
  take(args_.hidden_rows, args_.num_hidden, &hidden_, &hidden_places_);
}

void Pass::lay_out_statistics(uint32_t index, uint32_t begin, uint32_t end) {
  const sk_sequence& sequence = args_.sequences[index];
  const size_t block_sums = m_.layers.size() * shape_.widest;
  const uint32_t first_block = sequence.start / SK_BLOCK_SIZE;
  const uint32_t first_row = static_cast<uint32_t>(tokens_.size()) - (end - begin);
  for (uint32_t i = begin; i < end;) {
    const uint32_t position = sequence.start + i, block = position / SK_BLOCK_SIZE;
    const uint32_t stop = std::min(end, (block + 1) * SK_BLOCK_SIZE - sequence.start);
    // The attention sink, position 0, counts nowhere.
    const uint32_t from = position == 0 ? i + 1 : i;
    if (from < stop) {
      StatisticsUnit unit = {};
      unit.row = first_row + from - begin;
      unit.count = stop - from;
      unit.score = sequence.score;
      unit.share = sequence.score_share;
      units_.push_back(unit);
      unit_sums_.push_back(sequence.statistics + (block - first_block) * block_sums);
    }
    i = stop;
  }
}

int32_t Pass::reserve_chunks() {
  size_t of_row = 0;
  for (const Layer& layer : shape_.layers) {
    of_row =
        std::max(of_row, size_t{layer.heads} * most_chunks_ * (shape_.dim + 2) * sizeof(float));
  }
  attention_rows_ = static_cast<uint32_t>(
      std::clamp<size_t>(kChunkBytes / of_row, 1, std::max<uint32_t>(rows_.count, 1)));
  SK_TRY(m_.chunks.reserve(std::max(kChunkBytes, of_row)));
  const size_t rows = size_t{attention_rows_} * shape_.most_heads * most_chunks_;
  Buffers& b = m_.buffers;
  b.chunk_values = reinterpret_cast<float*>(m_.chunks.data());
  b.chunk_largest = b.chunk_values + rows * shape_.dim;
  b.chunk_total = b.chunk_largest + rows;
  return SK_STATUS_OK;
}

int32_t Pass::reserve_results() {
  const size_t layers = m_.layers.size();
  const auto place = [&](uint8_t* base) {
    Pieces pieces(base);
    sums_ = pieces.take<int64_t>(units_.size() * layers * shape_.widest);
    reads_ = pieces.take<uint64_t>(choosing_ ? (args_.num_sequences + 1) * layers * kReadKinds : 0);
    hidden_out_ = pieces.take<float>(hidden_.size() * shape_.hidden);
    return pieces.used();
  };
  result_bytes_ = place(nullptr);
  SK_TRY(m_.results.reserve(result_bytes_));
  place(m_.results.data());
  for (size_t i = 0; i < units_.size(); ++i) units_[i].sums = sums_ + i * layers * shape_.widest;
  return SK_STATUS_OK;
}

int32_t Pass::send() {
  std::vector<int32_t> tables;
  std::vector<uint32_t> begins;
  for (uint32_t s = 0; s < args_.num_sequences; ++s) {
    const sk_sequence& sequence = args_.sequences[s];
    begins.push_back(static_cast<uint32_t>(tables.size()));
    const uint32_t blocks = blocks_of(sequence.start + sequence.num_tokens, SK_BLOCK_SIZE);
    tables.insert(tables.end(), sequence.block_table, sequence.block_table + blocks);
  }
  std::vector<float> temperatures;
  for (uint32_t place : output_places_) temperatures.push_back(args_.temperatures[place]);
  std::vector<Choice> choices(choosing_ ? args_.num_sequences : 0, Choice{});
  std::vector<size_t> cores(choices.size()), thresholds(choices.size());
  for (size_t s = 0; s < choices.size(); ++s) {
    const sk_choice* from = args_.sequences[s].choice;
    if (from == nullptr) continue;
    choices[s].choosing = 1;
    choices[s].kind = from->kind;
    choices[s].correction = from->correction;
    cores[s] = step_.add(from->core, from->core_count);
    thresholds[s] = step_.add(from->thresholds, from->thresholds_count);
  }
  const size_t tokens = step_.add(tokens_), table = step_.add(tables), begin = step_.add(begins),
               outputs = step_.add(outputs_), hidden = step_.add(hidden_),
               cold = step_.add(temperatures), units = step_.add(units_),
               chosen = step_.add(choices), corrections = step_.add(corrections_);
  SK_TRY(step_.reserve());
  device_tokens_ = step_.at<Token>(tokens);
  block_tables_ = step_.at<int32_t>(table);
  table_begin_ = step_.at<uint32_t>(begin);
  output_rows_ = step_.at<uint32_t>(outputs);
  hidden_rows_ = step_.at<uint32_t>(hidden);
  temperatures_ = step_.at<float>(cold);
  device_units_ = step_.at<StatisticsUnit>(units);
  choices_ = step_.at<Choice>(chosen);
  device_corrections_ = step_.at<CorrectionArgs>(corrections);
  for (size_t s = 0; s < choices.size(); ++s) {
    const sk_choice* from = args_.sequences[s].choice;
    if (from == nullptr) continue;
    Choice* to = step_.edit<Choice>(chosen) + s;
    if (from->core != nullptr) to->core = step_.at<uint64_t>(cores[s]);
    if (from->thresholds != nullptr) to->thresholds = step_.at<float>(thresholds[s]);
  }
  for (size_t i = 0; i < corrections_.size(); ++i) {
    CorrectionArgs& to = corrections_[i];
    to.of_number = m_.layers[i].corrections;
    to.tokens = device_tokens_;
    to.choices = choices_;
    to.z = m_.buffers.z;
    to.normed = m_.buffers.normed;
    to.normed_stride = m_.normed_stride;
    to.hidden = shape_.hidden;
    to.rows = rows_.count;
    step_.edit<CorrectionArgs>(corrections)[i] = to;
  }
  SK_TRY(step_.send());
  if (units_.empty()) return SK_STATUS_OK;
  return clear(m_.device, m_.stream, sums_,
               units_.size() * m_.layers.size() * shape_.widest * sizeof(int64_t));
}

int32_t Pass::tick(sk_phase phase) {
  if (args_.phase_seconds == nullptr) return SK_STATUS_OK;
  SK_TRY(wait(m_.device, m_.stream));
  const Clock::time_point now = Clock::now();
  args_.phase_seconds[phase] += std::chrono::duration<double>(now - mark_).count();
  mark_ = now;
  return SK_STATUS_OK;
}

uint8_t* Pass::kv_of(uint32_t layer) const {
  return static_cast<uint8_t*>(args_.kv) + shape_.layers[layer].kv_offset * args_.kv_num_blocks;
}

int32_t Pass::embed() {
  EmbedArgs args = {};
  args.tokens = device_tokens_;
  args.embedding = m_.embedding.codes;
  args.embedding_stride = m_.embedding.stride;
  args.x = m_.buffers.x;
  args.rows = rows_.count;
  args.hidden = shape_.hidden;
  args.frequencies = m_.frequencies;
  args.rope_rows = shape_.rope_rows;
  args.half = shape_.head_dim / 2;
  args.rope_scale = shape_.rope_scale;
  args.cos = m_.buffers.cos;
  args.sin = m_.buffers.sin;
  return start("embed", {rows_.count, 1, 1}, args);
}

void Pass::with_parts(PrepareArgs* args, uint32_t layer) const {
  const DeviceLayer& from = m_.layers[layer];
  args->source = kFromParts;
  args->parts = m_.buffers.parts;
  args->num_parts = from.slices;
  args->parts_stride = m_.parts_stride;
  args->down_rank = from.down.rank;
  args->down_factors = from.down.factors;
  args->down_halves = in_halves(from.down);
  args->down_basis = from.down_basis.rows;
  args->down_basis_stride = from.down_basis.stride;
  if (!corrections_.empty()) args->corrections = device_corrections_ + layer;
}

int32_t Pass::layer(uint32_t index) {
  const Layer& shape = shape_.layers[index];
  const DeviceLayer& own = m_.layers[index];
  PrepareArgs args = prepare_of(m_, kFromResidual, rows_.count);
  if (index != 0) with_parts(&args, index - 1);
  args.norm = own.attention_norm;
  put_operand(m_, own.qkv, own.qkv_basis, &args);
  SK_TRY(start("prepare", {rows_.count, 1, 1}, args));
  const uint32_t heads = shape.heads + 2 * shape.kv_heads, width = heads * shape_.dim;
  SK_TRY(multiply(m_, own.qkv, rows_.count, width, m_.buffers.projected, width, false, nullptr));
  HeadsArgs to = {};
  to.tokens = device_tokens_;
  to.projected = m_.buffers.projected;
  to.rows = rows_.count;
  to.heads = shape.heads;
  to.kv_heads = shape.kv_heads;
  to.head_dim = shape_.head_dim;
  to.dim = shape_.dim;
  to.bias = own.qkv_bias;
  to.q_norm = own.q_norm;
  to.k_norm = own.k_norm;
  to.eps = shape_.eps;
  to.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  to.cos = m_.buffers.cos;
  to.sin = m_.buffers.sin;
  to.queries = m_.buffers.queries;
  to.block_tables = block_tables_;
  to.table_begin = table_begin_;
  to.kv = kv_of(index);
  to.kv_head_bytes = shape_.kv_head_bytes;
  to.kv_bits = shape_.kv_bits;
  SK_TRY(start("finish_heads", {heads, blocks_of(rows_.count, kWarps), 1}, to));
  SK_TRY(tick(SK_PHASE_QKV));
  SK_TRY(attention(index));
  SK_TRY(tick(SK_PHASE_ATTENTION));
  SK_TRY(multiply(m_, own.output, rows_.count, shape_.hidden, m_.buffers.x, shape_.hidden, true,
                  own.output_bias));
  SK_TRY(tick(SK_PHASE_OUTPUT));
  SK_TRY(feed_forward(index));
  return tick(SK_PHASE_MLP);
}

int32_t Pass::attention(uint32_t index) {
  const Layer& shape = shape_.layers[index];
  const DeviceLayer& own = m_.layers[index];
  for (uint32_t first = 0; first < rows_.count; first += attention_rows_) {
    const uint32_t count = std::min(attention_rows_, rows_.count - first);
    AttendArgs args = {};
    args.tokens = device_tokens_ + first;
    args.queries = m_.buffers.queries + size_t{first} * shape.heads * shape_.dim;
    args.rows = count;
    args.heads = shape.heads;
    args.kv_heads = shape.kv_heads;
    args.dim = shape_.dim;
    args.window = shape.window;
    args.most_chunks = most_chunks_;
    args.block_tables = block_tables_;
    args.table_begin = table_begin_;
    args.kv = kv_of(index);
    args.kv_head_bytes = shape_.kv_head_bytes;
    args.kv_bits = shape_.kv_bits;
    args.chunk_values = m_.buffers.chunk_values;
    args.chunk_largest = m_.buffers.chunk_largest;
    args.chunk_total = m_.buffers.chunk_total;
    SK_TRY(start("attend", {most_chunks_, shape.kv_heads, count}, args));
    PrepareArgs merge = prepare_of(m_, kFromAttention, count);
    merge.size = shape.heads * shape_.head_dim;
    merge.tokens = args.tokens;
    merge.chunk_values = args.chunk_values;
    merge.chunk_largest = args.chunk_largest;
    merge.chunk_total = args.chunk_total;
    merge.heads = shape.heads;
    merge.head_dim = shape_.head_dim;
    merge.dim = shape_.dim;
    merge.most_chunks = most_chunks_;
    merge.window = shape.window;
    put_operand(m_, own.output, own.output_basis, &merge);
    merge.operand = from_row(merge.operand, first);
    SK_TRY(start("prepare", {count, 1, 1}, merge));
  }
  return SK_STATUS_OK;
}

int32_t Pass::feed_forward(uint32_t index) {
  const Layer& shape = shape_.layers[index];
  const DeviceLayer& own = m_.layers[index];
  const Buffers& b = m_.buffers;
  PrepareArgs args = prepare_of(m_, kFromResidual, rows_.count);
  args.norm = own.mlp_norm;
  put_operand(m_, own.gate, own.gate_up_basis, &args);
  if (planes_) args.squares = b.squares;
  SK_TRY(start("prepare", {rows_.count, 1, 1}, args));
  if (!corrections_.empty()) {
    SK_TRY(start("correct", {rows_.count, 1, 1}, corrections_[index]));
  }
  const uint32_t stride = shape.blocks * SK_NEURON_BLOCK;
  ActivateArgs make = {};
  make.gate = own.gate;
  make.up = own.up;
  make.operand = operand_in(m_, own.gate);
  make.rows = rows_.count;
  make.neurons = shape.neurons;
  make.activations = b.activations;
  make.stride = stride;
  if (choosing_) {
    make.choices = choices_;
    make.tokens = device_tokens_;
    make.layer = index;
    make.words = shape_.words;
    make.planes_factors = own.planes_factors;
    make.gate_factors = own.gate_factors;
    make.squares = b.squares;
    make.down_planes = own.down.low != nullptr;
    make.masks = b.masks;
  }
  uint32_t tiles;
  const std::string activate = kernel_for("activate", own.gate, rows_.count, &tiles);
  SK_TRY(start(activate, {stride / SK_ROW_TILE, tiles, 1}, make));
  if (choosing_) {
    const CountArgs count = {b.masks,
                             device_tokens_,
                             rows_.count,
                             stride / 16,
                             reads_,
                             args_.num_sequences,
                             static_cast<uint32_t>(m_.layers.size()),
                             index};
    SK_TRY(start("count_reads", {1, 1, 1}, count));
  }
  if (!units_.empty()) {
    const StatisticsArgs score = {device_units_, static_cast<uint32_t>(units_.size()),
                                  shape.neurons, stride,
                                  shape_.widest, index,
                                  b.activations};
    SK_TRY(start("statistics", {score.num_units, 1, 1}, score));
  }
  DownArgs down = {};
  down.weights = own.down;
  down.activations = b.activations;
  down.rows = rows_.count;
  down.stride = stride;
  down.blocks = shape.blocks;
  down.slices = own.slices;
  if (choosing_) down.masks = b.masks;
  down.parts = b.parts;
  down.parts_stride = m_.parts_stride;
  down.activation_bits = shape_.activation_bits;
  const std::string kernel = kernel_for("down", own.down, rows_.count, &tiles);
  return start(kernel, {own.down.columns / SK_COLUMN_TILE, own.slices, tiles}, down);
}

int32_t Pass::end() {
  PrepareArgs args = prepare_of(m_, kFromParts, rows_.count);
  with_parts(&args, static_cast<uint32_t>(m_.layers.size()) - 1);
  SK_TRY(start("prepare", {rows_.count, 1, 1}, args));
  if (!hidden_.empty()) {
    const CopyArgs copy = {m_.buffers.x, hidden_rows_, hidden_out_,
                           static_cast<uint32_t>(hidden_.size()), shape_.hidden};
    SK_TRY(start("copy_rows", {copy.rows, 1, 1}, copy));
  }
  SK_TRY(tell());
  for (uint32_t i = 0; i < outputs_.size(); i += kHeadRows) {
    SK_TRY(head(i, std::min<uint32_t>(kHeadRows, static_cast<uint32_t>(outputs_.size()) - i)));
  }
  return SK_STATUS_OK;
}

int32_t Pass::head(uint32_t first, uint32_t count) {
  SK_TRY(head_logits(m_, output_rows_ + first, count));
  SK_TRY(tick(SK_PHASE_HEAD));
  const Buffers& b = m_.buffers;
  const uint32_t kept = std::min<uint32_t>(SK_NUM_CANDIDATES, shape_.vocab);
  CandidatesArgs args = {b.logits,
                         count,
                         shape_.vocab,
                         kept,
                         temperatures_ + first,
                         b.candidate_ids,
                         b.candidate_logits,
                         b.normalizers,
                         b.normalizers + kHeadRows};
  SK_TRY(start("candidates", {count, 1, 1}, args));
  Pieces sizes(nullptr);
  const auto land = [&](Pieces pieces, float** logits, int32_t** ids, float** values,
                        float** normalizers) {
    *logits = pieces.take<float>(size_t{count} * shape_.vocab);
    *ids = pieces.take<int32_t>(size_t{count} * kept);
    *values = pieces.take<float>(size_t{count} * kept);
    *normalizers = pieces.take<float>(2 * size_t{kHeadRows});
    return pieces.used();
  };
  float *logits, *values, *normalizers;
  int32_t* ids;
  SK_TRY(m_.landing.reserve(land(sizes, &logits, &ids, &values, &normalizers)));
  land(Pieces(m_.landing.data()), &logits, &ids, &values, &normalizers);
  const auto bring = [&](void* to, const void* from, size_t bytes) {
    return copy_out(m_.device, m_.stream, to, from, bytes);
  };
  SK_TRY(bring(logits, b.logits, size_t{count} * shape_.vocab * sizeof(float)));
  SK_TRY(bring(ids, b.candidate_ids, size_t{count} * kept * sizeof(int32_t)));
  SK_TRY(bring(values, b.candidate_logits, size_t{count} * kept * sizeof(float)));
  SK_TRY(bring(normalizers, b.normalizers, 2 * size_t{kHeadRows} * sizeof(float)));
  SK_TRY(wait(m_.device, m_.stream));
  for (uint32_t i = 0; i < count; ++i) {
    const size_t place = output_places_[first + i];
    std::copy_n(logits + size_t{i} * shape_.vocab, shape_.vocab,
                args_.logits + place * shape_.vocab);
    std::copy_n(ids + size_t{i} * kept, kept, args_.candidate_ids + place * kept);
    std::copy_n(values + size_t{i} * kept, kept, args_.candidate_logits + place * kept);
    args_.log_normalizers[place] = normalizers[i];
    args_.log_normalizers_1[place] = normalizers[kHeadRows + i];
    if (args_.needed != nullptr) args_.rescored[place] = shape_.vocab;
  }
  return tick(SK_PHASE_CANDIDATES);
}

int32_t Pass::tell() {
  const size_t layers = m_.layers.size();
  // sums_, reads_ and hidden_out_ are pieces of one memory, which comes in one copy.
  if (result_bytes_ == 0) return SK_STATUS_OK;
  SK_TRY(m_.landing.reserve(result_bytes_));
  SK_TRY(copy_out(m_.device, m_.stream, m_.landing.data(), m_.results.data(), result_bytes_));
  SK_TRY(wait(m_.device, m_.stream));
  const auto landed = [&](const auto* piece) {
    return reinterpret_cast<decltype(piece)>(
        m_.landing.data() + (reinterpret_cast<const uint8_t*>(piece) - m_.results.data()));
  };
  const size_t block_sums = layers * shape_.widest;
  for (size_t i = 0; i < units_.size(); ++i) {
    const int64_t* from = landed(sums_) + i * block_sums;
    for (size_t j = 0; j < block_sums; ++j) unit_sums_[i][j] += from[j];
  }
  for (uint32_t s = 0; choosing_ && s <= args_.num_sequences; ++s) {
    uint64_t* to = s < args_.num_sequences ? args_.sequences[s].reads : args_.union_reads;
    const uint64_t* from = landed(reads_) + s * layers * kReadKinds;
    for (size_t i = 0; to != nullptr && i < layers * kReadKinds; ++i) to[i] += from[i];
  }
  for (size_t i = 0; i < hidden_.size(); ++i) {
    std::copy_n(landed(hidden_out_) + i * shape_.hidden, shape_.hidden,
                args_.hidden + size_t{hidden_places_[i]} * shape_.hidden);
  }
  return SK_STATUS_OK;
}

int32_t run_forward(Model& model, const sk_forward_args& args) {
  if (args.phase_seconds != nullptr) std::fill_n(args.phase_seconds, SK_NUM_PHASES, 0.0);
  uint32_t rows = 0;
  bool choosing = false;
  for (uint32_t s = 0; s < args.num_sequences; ++s) {
    rows += args.sequences[s].num_tokens;
    choosing = choosing || args.sequences[s].choice != nullptr;
  }
  for (size_t i = 0; args.union_reads != nullptr && i < model.layers.size() * kReadKinds; ++i) {
    args.union_reads[i] = choosing ? 0 : model.shape.layers[i / kReadKinds].neurons;
  }
  for (uint32_t first = 0; first < rows; first += kPassRows) {
    SK_TRY(Pass(model, args, {first, std::min(kPassRows, rows - first)}).run());
  }
  return wait(model.device, model.stream);
}

int32_t run_logits(Model& model, const sk_logits_args& args) {
  const Description& shape = model.shape;
  for (uint32_t first = 0; first < args.rows; first += kHeadRows) {
    const uint32_t count = std::min(kHeadRows, args.rows - first);
    const size_t bytes = size_t{count} * shape.hidden * sizeof(float);
    SK_TRY(model.staging.reserve(bytes));
    std::memcpy(model.staging.data(), args.hidden + size_t{first} * shape.hidden, bytes);
    SK_TRY(copy_in(model.device, model.stream, model.buffers.x, model.staging.data(), bytes));
    SK_TRY(head_logits(model, nullptr, count));
    const size_t numbers = size_t{count} * shape.vocab;
    SK_TRY(model.landing.reserve(numbers * sizeof(float)));
    SK_TRY(copy_out(model.device, model.stream, model.landing.data(), model.buffers.logits,
                    numbers * sizeof(float)));
    SK_TRY(wait(model.device, model.stream));
    std::copy_n(reinterpret_cast<const float*>(model.landing.data()), numbers,
                args.logits + size_t{first} * shape.vocab);
  }
  return SK_STATUS_OK;
}

}  // namespace cuda
}  // namespace sk
