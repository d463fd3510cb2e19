// The launches of a pass.
#include <algorithm>
#include <cmath>

#include "forward.hpp"

namespace sk {
namespace cuda {
namespace {

// By kind of product, format of the weights, and 1, 4 or 8 tiles of rows.
#define SK_OF_TILES(name) {name "_1", name "_4", name "_8"}
#define SK_OF_FORMATS(name)                                                               \
  {SK_OF_TILES(name "_bfloat16"), SK_OF_TILES(name "_planes"), SK_OF_TILES(name "_int8"), \
   SK_OF_TILES(name "_int4")}
constexpr const char* kKernels[3][4][3] = {SK_OF_FORMATS("dot"), SK_OF_FORMATS("activate"),
                                           SK_OF_FORMATS("down")};
#undef SK_OF_FORMATS
#undef SK_OF_TILES

uint32_t format_of(const Weights& weights) {
  if (weights.bits == 16) return 0;
  if (weights.low_bits != 0) return 1;
  return weights.bits == 8 ? 2 : 3;
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
  const char* kernel = kernel_for(kDot, weights, rows, &tiles);
  return launch(model.device, model.stream, kernel, {weights.rows / SK_ROW_TILE, tiles, 1}, &args,
                sizeof(args));
}

}  // namespace

const char* kernel_for(Product product, const Weights& weights, uint32_t rows, uint32_t* blocks) {
  const uint32_t size = rows <= kTokensOfTile ? 0 : rows <= 4 * kTokensOfTile ? 1 : 2;
  constexpr uint32_t kTiles[] = {1, 4, 8};
  *blocks = blocks_of(rows, kTiles[size] * kTokensOfTile);
  return kKernels[product][format_of(weights)][size];
}

int32_t head_logits(Model& model, const uint32_t* row_list, uint32_t rows, float* logits) {
  PrepareArgs args = prepare_of(model, kFromResidual, rows);
  args.row_list = row_list;
  args.norm = model.norm;
  put_operand(model, model.lm_head, {}, &args);
  SK_TRY(launch(model.device, model.stream, "prepare", {rows, 1, 1}, &args, sizeof(args)));
  return multiply(model, model.lm_head, rows, model.shape.vocab, logits, model.shape.vocab, false,
                  nullptr);
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

int32_t Pass::launch_all() {
  SK_TRY(embed());
  for (uint32_t i = 0; i < m_.layers.size(); ++i) SK_TRY(layer(i));
  return end();
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
  args->down_bias = from.down_bias;
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
  const char* activate = kernel_for(kActivate, own.gate, rows_.count, &tiles);
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
  const char* kernel = kernel_for(kDown, own.down, rows_.count, &tiles);
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
  return outputs_.empty() ? SK_STATUS_OK : head(0);
}

int32_t Pass::head(uint32_t first) {
  const uint32_t count = head_rows(first);
  SK_TRY(head_logits(m_, output_rows_ + first, count, logits_of(first)));
  SK_TRY(tick(SK_PHASE_HEAD));
  const HeadResults at = head_results(shape_, count, m_.buffers.head_results);
  CandidatesArgs args = {};
  args.logits = logits_of(first);
  args.rows = count;
  args.vocab = shape_.vocab;
  args.kept = kept_candidates(shape_);
  args.temperatures = temperatures_ + first;
  args.ids = at.ids;
  args.values = at.values;
  args.log_normalizers = at.normalizers;
  args.log_normalizers_1 = at.normalizers_1;
  return start("candidates", {count, 1, 1}, args);
}

}  // namespace cuda
}  // namespace sk
