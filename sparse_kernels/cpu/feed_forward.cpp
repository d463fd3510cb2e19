// The feed-forward layers: few tokens fused per partition of the neurons, many in two phases; the
// same sums.
#include "forward.hpp"

namespace sk {
namespace {

constexpr size_t kDownColumns = 128;  // columns of the down product in a unit: whole groups

}  // namespace

void Forward::feed_forward(const Layer& layer, size_t index, const Own& own) {
  float* const scratch = own.scratch;
  const Layer* next = index + 1 < m_.layers.size() ? &m_.layers[index + 1] : nullptr;
  const auto norm = [&](size_t from, size_t to) {
    if (next != nullptr) norm_tokens(next->attention_norm, next->qkv, from, to, own.normed);
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
        [&] { if_few_tokens(finish); }, next_share(index, own));
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
    phase(own, statistics_.size(), [&](size_t i) { add_statistics(statistics_[i], layer, index); });
  }
}

void Forward::activate(const Layer& layer, size_t first, size_t last, float* scratch) {
  const size_t row = first * SK_NEURON_BLOCK, rows = (last - first) * SK_NEURON_BLOCK;
  float *gate = scratch, *up = scratch + count_ * rows;
  layer.gate.products->dot(&layer.gate, row, rows, operand_, count_, gate, rows);
  layer.up.products->dot(&layer.up, row, rows, operand_, count_, up, rows);
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
    layer.down.products->swiglu(&task);
  }
}

void Forward::down(const Layer& layer, uint32_t partition, size_t column, size_t columns,
                   float* out, bool add) {
  DownTask task = {};
  task.weights = &layer.down;
  task.neurons = size_t{layer.blocks} * SK_NEURON_BLOCK;
  task.first_neuron = size_t{layer.partition_begin(partition)} * SK_NEURON_BLOCK;
  task.last_neuron = size_t{layer.partition_begin(partition + 1)} * SK_NEURON_BLOCK;
  task.first_column = column;
  task.columns = columns;
  task.activations = activations_;
  task.tokens = count_;
  task.out = out;
  task.out_stride = m_.columns;
  task.add = add;
  layer.down.products->down(&task);
}

void Forward::add_partitions(const Layer& layer, size_t token) {
  float* first = partial_ + token * m_.columns;
  k_.sum_rows(first, count_ * m_.columns, layer.partitions, m_.columns, first);
  take(token, 0, first, m_.columns);
}

void Forward::add_statistics(const StatisticsUnit& unit, const Layer& layer, size_t index) {
  const size_t stride = size_t{layer.blocks} * SK_NEURON_BLOCK;
  for (uint32_t i = 0; i < unit.count; ++i) {
    const float* a = plain_ + (unit.row + i) * stride;
    k_.add_norm_scores(a, layer.neurons, k_.sum_of_squares(a, layer.neurons),
                       unit.sums + index * m_.widest);
  }
}

}  // namespace sk
