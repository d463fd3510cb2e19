// The feed-forward layers: few tokens fused per partition of the neurons, many in two phases; the
// same sums.
#include <cmath>
#include <functional>

#include "forward.hpp"
#include "low_rank.hpp"

namespace sk {
namespace {

constexpr size_t kDownColumns = 128;  // columns of the down product in a unit: whole groups
constexpr size_t kDownBlocks = kMaxDownNeurons / SK_NEURON_BLOCK;

// Columns of a prompt's down product in a unit: each is prepared anew, so few and wide ones.
size_t prompt_columns(size_t columns, size_t threads) {
  const size_t share = (columns + threads - 1) / threads;
  return round_up(std::clamp<size_t>(share, kDownColumns, 4 * kDownColumns), SK_COLUMN_TILE);
}

// One more for the neurons of a token that a count counts; `ranked` has room for n numbers.
void add_counts(const float* a, size_t n, const sk_sequence& sequence, float* ranked,
                int64_t* sums) {
  constexpr int64_t kOne = int64_t{1} << 32;
  const bool positive = sequence.score == SK_SCORE_SIGNED_COUNT;
  size_t eligible = 0;
  for (size_t i = 0; i < n; ++i) {
    const float v = positive ? a[i] : std::abs(a[i]);
    ranked[eligible] = v;
    eligible += !positive || v > 0;
  }
  const double share = static_cast<double>(sequence.score_share);
  const size_t counted = static_cast<size_t>(std::ceil(share * static_cast<double>(eligible)));
  if (counted == 0) return;
  std::nth_element(ranked, ranked + (counted - 1), ranked + eligible, std::greater<float>());
  const float least = ranked[counted - 1];
  size_t above = 0;
  for (size_t i = 0; i < counted; ++i) above += ranked[i] > least;
  size_t equal = counted - above;  // of those that are just as large; the first ones
  for (size_t i = 0; i < n; ++i) {
    const float v = positive ? a[i] : std::abs(a[i]);
    const bool tied = v == least && equal != 0;
    equal -= tied;
    if (v > least || tied) sums[i] += kOne;
  }
}

}  // namespace

void Forward::feed_forward(const Layer& layer, size_t index, const Own& own) {
  float* const scratch = own.scratch;
  const Layer* next = index + 1 < m_.layers.size() ? &m_.layers[index + 1] : nullptr;
  const auto norm = [&](size_t from, size_t to) {
    if (next == nullptr) return;
    norm_tokens(next->attention_norm, next->qkv, next->qkv_basis, from, to, own);
  };
  const size_t columns = layer.down.columns;
  // Prompts that are rounded otherwise need no partitions.
  const bool own_way = &products(layer.down) != layer.down.products;
  if (fused_ && !own_way) {
    const size_t partitions = layer.partitions + corrected_;
    const auto finish = [&](size_t from, size_t to) {
      for (size_t t = from; t < to; ++t) add_partitions(layer, partitions, t);
      if (m_.reduce.add_up == nullptr) norm(from, to);
    };
    const uint32_t units =
        choosing_ ? ChosenUnits(layer, ranges_.size()).count() : layer.partitions;
    phase(
        own, units + corrected_,
        [&](size_t i) {
          const uint32_t unit = static_cast<uint32_t>(i);
          fetch_basis(layer.down, layer.down_basis, unit, units, own);
          if (next != nullptr) fetch_basis(next->qkv, next->qkv_basis, unit, units, own);
          if (unit == units) {
            return correct(index, scratch, partial_ + layer.partitions * count_ * columns);
          }
          if (is_copied(index)) return add_copied(layer, index, unit, own);
          if (choosing_) return add_chosen(layer, index, unit, own);
          const size_t begin = layer.partition_begin(unit), end = layer.partition_begin(unit + 1);
          activate(layer, begin, end, scratch);
          down(layer, begin, end, 0, columns, partial_ + i * count_ * columns, false);
        },
        [&] {
          if (choosing_) tell_reads(index);
          if_few_tokens(finish);
        },
        next_share(index, own));
    then_per_token(own, finish);
  } else {
    phase(own, layer.blocks, [&](size_t block) { activate(layer, block, block + 1, scratch); });
    const size_t unit = own_way ? prompt_columns(columns, ranges_.size()) : kDownColumns;
    const uint32_t pieces =
        own_way ? static_cast<uint32_t>((layer.blocks + kDownBlocks - 1) / kDownBlocks)
                : layer.partitions;
    // The further outputs of a low-rank term are there when all columns are.
    const bool low_rank = layer.down.rank != 0, last = m_.reduce.add_up == nullptr;
    const auto finish = [&](size_t from, size_t to) {
      for (size_t t = from; low_rank && t < to; ++t) add_partitions(layer, 1, t);
      if (last) norm(from, to);
    };
    const auto add_columns = [&](size_t i) {
      const size_t first = i * unit, n = std::min<size_t>(unit, columns - first);
      for (uint32_t p = 0; p < pieces; ++p) {
        const size_t begin = own_way ? p * kDownBlocks : layer.partition_begin(p);
        const size_t end = own_way ? std::min<size_t>((p + 1) * kDownBlocks, layer.blocks)
                                   : layer.partition_begin(p + 1);
        down(layer, begin, end, first, n, partial_ + first, p != 0);
      }
      for (size_t t = 0; !low_rank && t < count_; ++t) {
        take(t, first, layer.down_bias, partial_ + t * columns + first, n);
      }
    };
    phase(own, (columns + unit - 1) / unit, add_columns, [&] { if_few_tokens(finish); });
    if (low_rank || last) then_per_token(own, finish);
  }
  if (m_.reduce.add_up != nullptr) {
    phase(own, 1, [&](size_t) { reduce_all(); }, [&] { if_few_tokens(norm); });
    then_per_token(own, norm);
  }
  if (!statistics_.empty()) {
    phase(own, statistics_.size(),
          [&](size_t i) { add_statistics(statistics_[i], layer, index, scratch); });
  }
}

void Forward::activate(const Layer& layer, size_t first, size_t last, float* scratch) {
  const size_t row = first * SK_NEURON_BLOCK, rows = (last - first) * SK_NEURON_BLOCK;
  float *gate = scratch, *up = scratch + count_ * rows;
  products(layer.gate).dot(&layer.gate, row, rows, operand_, count_, gate, rows);
  products(layer.up).dot(&layer.up, row, rows, operand_, count_, up, rows);
  SwigluTask task = {};
  task.down = &layer.down;
  task.stride = rows;
  task.tokens = count_;
  task.neurons = task.plain_stride = size_t{layer.blocks} * SK_NEURON_BLOCK;
  task.activations = activations_;
  task.plain = plain_;
  for (size_t i = 0; i < rows; i += SK_NEURON_BLOCK) {
    task.gate = gate + i;
    task.up = up + i;
    task.first = row + i;
    products(layer.down).swiglu(&task);
  }
}

void Forward::down(const Layer& layer, size_t first, size_t last, size_t column, size_t columns,
                   float* out, bool add, Fetch* fetch, const CopiedLayer* copy) {
  DownTask task = {};
  task.weights = &layer.down;
  task.neurons = size_t{layer.blocks} * SK_NEURON_BLOCK;
  task.first_neuron = first * SK_NEURON_BLOCK;
  task.last_neuron = last * SK_NEURON_BLOCK;
  task.first_column = column;
  task.columns = columns;
  task.activations = activations_;
  task.tokens = count_;
  if (choosing_) {
    task.used = used_.data() + first;
    task.fetch = fetch;
    if (copy != nullptr) {
      task.weights = &copy->down;
      task.places = copy->starts.data() + first;
    } else if (layer.down_coarse.codes != nullptr) {
      task.coarse = &layer.down_coarse;
      task.by_coarse = coarse_.data() + first * count_;
    }
  }
  task.out = out;
  task.out_stride = layer.down.columns;
  task.add = add;
  products(layer.down).down(&task);
}

void Forward::add_partitions(const Layer& layer, size_t partitions, size_t token) {
  const size_t columns = layer.down.columns;
  float* first = partial_ + token * columns;
  k_.sum_rows(first, count_ * columns, partitions, columns, first);
  if (layer.down.rank != 0) {
    float z[SK_MAX_RANK];
    take_factor_outputs(layer.down, first, z);
    k_.add_rows(&layer.down_basis, z, layer.down.rank, first);
  }
  take(token, 0, layer.down_bias, first, m_.columns);
}

void Forward::add_statistics(const StatisticsUnit& unit, const Layer& layer, size_t index,
                             float* scratch) {
  const size_t stride = size_t{layer.blocks} * SK_NEURON_BLOCK;
  int64_t* const sums = unit.sums + index * m_.widest;
  const float* const first = plain_ + unit.row * stride;
  if (unit.sequence->score == SK_SCORE_NORM) {
    return k_.add_norm_scores(first, stride, unit.count, layer.neurons, sums);
  }
  for (const float* a = first; a < first + unit.count * stride; a += stride) {
    if (!std::isfinite(k_.sum_of_squares(a, layer.neurons))) continue;
    add_counts(a, layer.neurons, *unit.sequence, scratch, sums);
  }
}

}  // namespace sk
