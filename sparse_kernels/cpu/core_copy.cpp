#include "core_copy.hpp"

#include <algorithm>
#include <cstring>
#include <new>

namespace sk {
namespace {

constexpr size_t kLine = 64;

// A copy takes about the time of a step and saves a part of each one after it. It is made when a
// core comes again; those of several sequences change whenever one comes or goes.
constexpr size_t kSeenAlone = 2, kSeenTogether = 4;
// Of all neurons: where there are more, reading them all side by side is hardly slower.
constexpr double kMostShare = 0.9;

// Hands out pieces of memory; without any it counts them.
class Pieces {
 public:
  explicit Pieces(uint8_t* memory) : memory_(memory) {}
  uint8_t* next(size_t bytes) {
    uint8_t* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(bytes, kLine);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  uint8_t* memory_;
  size_t used_ = 0;
};

size_t row_bytes(const Matrix& matrix, uint32_t bits) { return size_t{matrix.columns} * bits / 8; }

// Where the copy of a matrix stands: the rows of its planes next to each other.
Matrix placed(const Matrix& from, size_t rows, bool with_scales, Pieces* pieces) {
  Matrix to = from;
  to.stride = row_bytes(from, from.bits);
  to.codes = pieces->next(rows * to.stride);
  if (from.low != nullptr) {
    to.low_stride = row_bytes(from, from.low_bits);
    to.low = pieces->next(rows * to.low_stride);
  }
  if (with_scales && from.scales != nullptr) {
    const size_t count = rows * from.groups;
    to.scales = reinterpret_cast<const uint16_t*>(pieces->next(count * sizeof(uint16_t)));
    to.zeros = pieces->next(count);
  }
  return to;
}

void copy_row(const uint8_t* from, size_t from_stride, size_t row, const uint8_t* to, size_t stride,
              size_t to_row) {
  std::memcpy(const_cast<uint8_t*>(to) + to_row * stride, from + row * from_stride, stride);
}

void copy_codes(const Matrix& from, size_t row, const Matrix& to, size_t to_row) {
  copy_row(from.codes, from.stride, row, to.codes, to.stride, to_row);
  if (from.low != nullptr) {
    copy_row(from.low, from.low_stride, row, to.low, to.low_stride, to_row);
  }
}

void copy_scales(const Matrix& from, size_t row, const Matrix& to, size_t to_row) {
  if (from.scales == nullptr) return;
  const auto place = [&](size_t of, size_t group) {
    return (of / SK_ROW_TILE * from.groups + group) * SK_ROW_TILE + of % SK_ROW_TILE;
  };
  for (size_t group = 0; group < from.groups; ++group) {
    const size_t at = place(row, group), to_at = place(to_row, group);
    const_cast<uint16_t*>(to.scales)[to_at] = from.scales[at];
    const_cast<uint8_t*>(to.zeros)[to_at] = from.zeros[at];
  }
}

}  // namespace

ChosenUnits::ChosenUnits(const Layer& layer, size_t threads)
    : layer_(layer),
      together_(std::max(layer.partitions / (4 * static_cast<uint32_t>(threads)), 1u)) {}

uint64_t CoreCopy::mask(const Description& model, size_t layer, size_t block) const {
  const size_t left = model.layers[layer].neurons - block * SK_NEURON_BLOCK;
  const uint64_t exist = left >= SK_NEURON_BLOCK ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
  return core_[layer * model.words + block] & exist;
}

bool CoreCopy::take(const Description& model, size_t threads, size_t sequences,
                    const uint64_t* core) {
  if (!wanted_) return false;
  const size_t words = model.layers.size() * model.words;
  if (core_.size() != words || !std::equal(core_.begin(), core_.end(), core)) {
    core_.assign(core, core + words);
    seen_ = 0;
    planned_ = refused_ = stale_ = false;
  }
  if (planned_ || refused_) return planned_;
  if (++seen_ < (sequences == 1 ? kSeenAlone : kSeenTogether)) return false;
  planned_ = stale_ = plan(model, threads);
  refused_ = !planned_;
  return planned_;
}

bool CoreCopy::plan(const Description& model, size_t threads) try {
  layers_.assign(model.layers.size(), {});
  std::vector<size_t> rows(model.layers.size(), 0);
  size_t copied = 0, neurons = 0;
  most_rows_ = 0;
  for (size_t index = 0; index < model.layers.size(); ++index) {
    const Layer& layer = model.layers[index];
    const ChosenUnits units(layer, threads);
    std::vector<uint32_t> starts(layer.blocks);
    size_t row = 0, chosen = 0;
    for (uint32_t unit = 0; unit < units.count(); ++unit) {
      const size_t first = row;
      for (uint32_t block = units.block(unit); block < units.block(unit + 1); ++block) {
        const size_t own = static_cast<size_t>(__builtin_popcountll(mask(model, index, block)));
        starts[block] = static_cast<uint32_t>(row);
        row += own;
        chosen += own;
      }
      row = round_up(row, SK_ROW_TILE);
      most_rows_ = std::max(most_rows_, static_cast<uint32_t>(row - first));
    }
    copied += chosen;
    neurons += layer.neurons;
    if (chosen == layer.neurons) continue;
    rows[index] = row;
    layers_[index].starts = std::move(starts);
  }
  if (static_cast<double>(copied) > kMostShare * static_cast<double>(neurons)) return false;
  const auto place_all = [&](uint8_t* memory) {
    Pieces pieces(memory);
    for (size_t index = 0; index < model.layers.size(); ++index) {
      const Layer& layer = model.layers[index];
      CopiedLayer& to = layers_[index];
      to.gate = placed(layer.gate, rows[index], true, &pieces);
      to.up = placed(layer.up, rows[index], true, &pieces);
      to.down = placed(layer.down, rows[index], false, &pieces);
    }
    return pieces.used();
  };
  const size_t bytes = place_all(nullptr);
  place_all(memory_.get<uint8_t>(bytes));
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

void CoreCopy::copy_layer(const Description& model, size_t index) {
  const Layer& from = model.layers[index];
  const CopiedLayer& to = layers_[index];
  for (size_t block = 0; block < to.starts.size(); ++block) {
    size_t to_row = to.starts[block];
    for (uint64_t left = mask(model, index, block); left != 0; left &= left - 1, ++to_row) {
      const size_t row = block * SK_NEURON_BLOCK + static_cast<size_t>(__builtin_ctzll(left));
      copy_codes(from.gate, row, to.gate, to_row);
      copy_scales(from.gate, row, to.gate, to_row);
      copy_codes(from.up, row, to.up, to_row);
      copy_scales(from.up, row, to.up, to_row);
      copy_codes(from.down, row, to.down, to_row);
    }
  }
}

}  // namespace sk
