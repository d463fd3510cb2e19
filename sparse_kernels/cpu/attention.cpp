// Attention over the paged KV cache: chunks of positions, merged in order.
#include <cmath>

#include "forward.hpp"

namespace sk {
namespace {

constexpr uint32_t kPartsAhead = 4;  // chunks

}  // namespace

Forward::Span Forward::span_of(const Layer& layer, const QueryTile& tile) const {
  const uint32_t first = tokens_[tile.row].position;
  const uint32_t last = tokens_[tile.row + tile.count - 1].position;
  const uint32_t seen =
      layer.window != 0 && first + 1 > layer.window ? first + 1 - layer.window : 0;
  return {seen / kAttentionChunk, last / kAttentionChunk + 1, last + 1};
}

void Forward::attend_chunk(const Layer& layer, const QueryTile& tile, const Span& span,
                           uint32_t head, uint32_t chunk_index, float* values, float* largest,
                           float* total) {
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
  chunk.seen_end = span.end;
  chunk.block_table = tile.sequence->block_table;
  chunk.kv = kv_block(layer, 0, head);
  chunk.block_stride = layer.kv_heads * m_.kv_head_bytes;
  chunk.largest = largest;
  chunk.total = total;
  chunk.values = values;
  m_.kv->attend(&chunk);
}

void Forward::attend(const Layer& layer, const Own& own) {
  float* const scratch = own.scratch;
  const std::vector<QueryTile>& tiles = tiles_[layer.heads / layer.kv_heads];
  const auto store = [&](size_t from, size_t to) {
    const size_t width = layer.output.columns;
    store_inputs(layer.output, layer.output_basis, size_t{layer.heads} * m_.head_dim, from, to,
                 mixed_ + from * width, width, attention_operand_, own);
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
        [&] { if_few_tokens(store); }, output_share(layer, own));
  } else {
    phase(
        own, heads,
        [&](size_t i) {
          attend_whole(layer, tiles[i / layer.kv_heads], static_cast<uint32_t>(i % layer.kv_heads),
                       scratch);
        },
        [&] { if_few_tokens(store); }, output_share(layer, own));
  }
  then_per_token(own, store);
}

void Forward::attend_whole(const Layer& layer, const QueryTile& tile, uint32_t head,
                           float* scratch) {
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

size_t Forward::part_row(const Layer& layer, const QueryTile& tile, uint32_t head,
                         uint32_t chunk) const {
  const uint32_t group = layer.heads / layer.kv_heads;
  return (size_t{chunk} * layer.kv_heads + head) * count_ * group + size_t{tile.row} * group;
}

void Forward::attend_part(const Layer& layer, const QueryTile& tile, uint32_t head,
                          uint32_t chunk) {
  const Span span = span_of(layer, tile);
  if (chunk < span.first_chunk || chunk >= span.last_chunk) return;
  const size_t row = part_row(layer, tile, head, chunk);
  attend_chunk(layer, tile, span, head, chunk, chunk_values_ + row * m_.dim, chunk_largest_ + row,
               chunk_total_ + row);
}

void Forward::merge_parts(const Layer& layer, const QueryTile& tile, uint32_t head,
                          float* scratch) {
  const Span span = span_of(layer, tile);
  for (uint32_t i = 0; i < tile.count * (layer.heads / layer.kv_heads); ++i) {
    SoftmaxState state = {};
    for (uint32_t chunk = span.first_chunk; chunk < span.last_chunk; ++chunk) {
      const size_t row = part_row(layer, tile, head, chunk) + i;
      if (chunk + kPartsAhead < span.last_chunk) {  // perhaps in another core's cache
        const float* next =
            chunk_values_ + (part_row(layer, tile, head, chunk + kPartsAhead) + i) * m_.dim;
        for (size_t at = 0; at < m_.dim; at += 16) __builtin_prefetch(next + at, 0, 3);
      }
      merge(&state, scratch, chunk_largest_[row], chunk_total_[row], chunk_values_ + row * m_.dim);
    }
    finish_row(layer, tile, head, i, state, scratch);
  }
}

void Forward::merge(SoftmaxState* state, float* values, float largest, float total,
                    const float* more) const {
  // The chunk held nothing for this row. (-inf as the largest would not tell: scores that are no
  // numbers may leave it too.)
  if (total == 0) return;
  if (state->total == 0) {
    *state = {largest, total};
    std::copy_n(more, m_.dim, values);
    return;
  }
  const bool larger = largest > state->largest;
  const float factor = std::exp(larger ? state->largest - largest : largest - state->largest);
  const float keep = larger ? factor : 1, take = larger ? 1 : factor;
  *state = {larger ? largest : state->largest, state->total * keep + total * take};
  for (size_t i = 0; i < m_.dim; ++i) values[i] = values[i] * keep + more[i] * take;
}

void Forward::finish_row(const Layer& layer, const QueryTile& tile, uint32_t head, uint32_t row,
                         const SoftmaxState& state, const float* values) {
  const uint32_t group = layer.heads / layer.kv_heads;
  float* to = mixed_ + (tile.row + row / group) * layer.output.columns +
              (head * group + row % group) * m_.head_dim;
  const float factor = 1.0f / state.total;
  for (size_t i = 0; i < m_.head_dim; ++i) to[i] = values[i] * factor;
}

}  // namespace sk
