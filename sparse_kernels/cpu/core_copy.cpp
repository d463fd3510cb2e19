#include "core_copy.hpp"

#include <algorithm>
#include <cstring>
#include <new>

#include "scratch.hpp"

namespace sk {
namespace {

constexpr size_t kLine = 64;

// A copy takes the time of a few steps and saves a part of each one after it: it pays when it is
// read so often. It is made as soon as a core comes again; where the last one did not pay, because
// cores change all the time, not before the next one would have.
constexpr size_t kPays = 16, kAgain = 2;
// Of all neurons: where there are more, reading them all side by side is hardly slower.
constexpr double kMostShare = 0.9;
// Of the neurons in a copy: where fewer are wanted, it is made anew.
constexpr double kLeastShare = 0.8;

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

// 16 rows side by side, 2048 bytes apart, would compete for a few sets of the first-level cache.
size_t spaced(size_t bytes) { return bytes % 2048 == 0 ? bytes + kLine : bytes; }

// Where the copy of a matrix stands: the rows of its planes next to each other.
Matrix placed(const Matrix& from, size_t rows, bool with_scales, Pieces* pieces) {
  Matrix to = from;
  to.stride = spaced(row_bytes(from, from.bits));
  to.codes = pieces->next(rows * to.stride);
  if (from.low != nullptr) {
    to.low_stride = spaced(row_bytes(from, from.low_bits));
    to.low = pieces->next(rows * to.low_stride);
  }
  if (with_scales && from.scales != nullptr) {
    const size_t count = rows * from.groups;
    to.scales = reinterpret_cast<const uint16_t*>(pieces->next(count * sizeof(uint16_t)));
    to.zeros = pieces->next(count);
  }
  return to;
}

void copy_codes(const Matrix& from, size_t row, const Matrix& to, size_t to_row) {
  const auto copy_row = [&](const uint8_t* codes, size_t stride, uint32_t bits, const uint8_t* out,
                            size_t out_stride) {
    std::memcpy(const_cast<uint8_t*>(out) + to_row * out_stride, codes + row * stride,
                row_bytes(from, bits));
  };
  copy_row(from.codes, from.stride, from.bits, to.codes, to.stride);
  if (from.low != nullptr) {
    copy_row(from.low, from.low_stride, from.low_bits, to.low, to.low_stride);
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

size_t count_of(uint64_t mask) { return static_cast<size_t>(__builtin_popcountll(mask)); }

}  // namespace

ChosenUnits::ChosenUnits(const Layer& layer, size_t threads)
    : layer_(layer),
      together_(std::max(layer.partitions / (4 * static_cast<uint32_t>(threads)), 1u)) {}

bool CoreCopy::holds(const std::vector<uint64_t>& core) const {
  if (!planned_) return false;
  size_t wanted = 0;
  for (size_t i = 0; i < core.size(); ++i) {
    if ((core[i] & ~copied_[i]) != 0) return false;
    wanted += count_of(core[i]);
  }
  return static_cast<double>(wanted) >= kLeastShare * static_cast<double>(neurons_);
}

bool CoreCopy::take(const Description& model, size_t threads, std::vector<uint64_t>&& core) {
  if (holds(core)) {
    ++reads_;
    return true;
  }
  if (core != seen_) {
    seen_ = std::move(core);
    times_ = 0;
  }
  if (++times_ != (reads_ < kPays ? kPays : kAgain)) return false;
  copied_ = seen_;
  reads_ = 0;
  planned_ = stale_ = plan(model, threads);
  return planned_;
}

size_t CoreCopy::lay_out(const Description& model, size_t threads) {
  layers_.assign(model.layers.size(), {});
  size_t copied = 0;
  neurons_ = most_rows_ = 0;
  for (size_t index = 0; index < model.layers.size(); ++index) {
    const Layer& layer = model.layers[index];
    const ChosenUnits units(layer, threads);
    std::vector<uint32_t> starts(layer.blocks);
    size_t row = 0, chosen = 0;
    for (uint32_t unit = 0; unit < units.count(); ++unit) {
      const size_t first = row;
      for (uint32_t block = units.block(unit); block < units.block(unit + 1); ++block) {
        starts[block] = static_cast<uint32_t>(row);
        row += count_of(mask(model, index, block));
        chosen += count_of(mask(model, index, block));
      }
      row = round_up(row, SK_ROW_TILE);
      most_rows_ = std::max(most_rows_, static_cast<uint32_t>(row - first));
    }
    neurons_ += chosen;
    if (chosen == layer.neurons) continue;
    copied += chosen;
    layers_[index].rows = row;
    layers_[index].starts = std::move(starts);
  }
  return copied;
}

bool CoreCopy::plan(const Description& model, size_t threads) try {
  size_t all = 0;
  for (const Layer& layer : model.layers) all += layer.neurons;
  const size_t copied = lay_out(model, threads);
  if (copied == 0 || static_cast<double>(neurons_) > kMostShare * static_cast<double>(all)) {
    return false;
  }
  const auto place_all = [&](uint8_t* memory) {
    Pieces pieces(memory);
    for (size_t index = 0; index < model.layers.size(); ++index) {
      const Layer& layer = model.layers[index];
      CopiedLayer& to = layers_[index];
      to.gate = placed(layer.gate, to.rows, true, &pieces);
      to.up = placed(layer.up, to.rows, true, &pieces);
      to.down = placed(layer.down, to.rows, false, &pieces);
    }
    return pieces.used();
  };
  const size_t bytes = place_all(nullptr);
  if (bytes > limit_) return false;
  place_all(memory_for(bytes));
  return true;
} catch (const std::bad_alloc&) {
  return false;
}

uint8_t* CoreCopy::memory_for(size_t bytes) {
  if (bytes <= bytes_) return memory_.get();
  memory_.reset();
  bytes_ = 0;
  bytes += bytes / 8;  // cores of one density differ by a few neurons; what is not touched is free
  memory_.reset(static_cast<uint8_t*>(allocate_pages(&bytes)));
  bytes_ = bytes;
  return memory_.get();
}

void CoreCopy::copy(const Description& model, size_t piece) {
  const size_t index = piece / kPieces, part = piece % kPieces;
  const Layer& from = model.layers[index];
  const CopiedLayer& to = layers_[index];
  const size_t blocks = to.starts.size();
  for (size_t block = blocks * part / kPieces; block < blocks * (part + 1) / kPieces; ++block) {
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
