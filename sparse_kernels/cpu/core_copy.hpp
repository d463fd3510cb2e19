// The neurons that are in the core of a sequence that decodes, or of any of several, side by side.
// Chosen rows are spread over memory: the CPU's own prefetching does not foresee them, and each
// step gathers them anew. A copy is read from its beginning to its end, as all neurons are. The
// bits are the same either way.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "description.hpp"

namespace sk {

// The units of work of a layer where some sequence chooses: each is some partitions.
class ChosenUnits {
 public:
  ChosenUnits(const Layer& layer, size_t threads);
  uint32_t count() const { return (layer_.partitions + together_ - 1) / together_; }
  // The first partition of a unit, and its first block; of unit `count` the end.
  uint32_t partition(uint32_t unit) const {
    return unit * together_ < layer_.partitions ? unit * together_ : layer_.partitions;
  }
  uint32_t block(uint32_t unit) const { return layer_.partition_begin(partition(unit)); }

 private:
  const Layer& layer_;
  uint32_t together_;
};

// A layer's rows that are in a core.
struct CopiedLayer {
  Matrix gate, up;
  Matrix down;      // its codes alone are copied: scales stay by neuron
  size_t rows = 0;  // of gate and up, what pads units included
  // [blocks] the row of a block's first neuron, a multiple of SK_ROW_TILE where a unit begins.
  // Empty where all neurons are in the core: there is no copy.
  std::vector<uint32_t> starts;
};

class CoreCopy {
 public:
  // It takes so many bytes at most.
  explicit CoreCopy(uint64_t limit) : limit_(limit) {}
  bool wanted() const { return limit_ != 0; }
  // Sees what is in the core [layers, words] of any sequence of a forward, of neurons that exist.
  // True: it is in the copy, which is to be read, and where `stale`, made before.
  bool take(const Description& model, size_t threads, std::vector<uint64_t>&& core);
  bool stale() const { return stale_; }
  // It is made in so many pieces, on any threads.
  size_t pieces() const { return layers_.size() * kPieces; }
  void copy(const Description& model, size_t piece);
  void copied() { stale_ = false; }

  const CopiedLayer& layer(size_t index) const { return layers_[index]; }
  uint32_t most_rows() const { return most_rows_; }  // of a unit
  // The neurons of a block that are in it.
  uint64_t mask(const Description& model, size_t layer, size_t block) const {
    return copied_[layer * model.words + block];
  }

 private:
  static constexpr size_t kPieces = 4;  // of a layer

  bool holds(const std::vector<uint64_t>& core) const;
  bool plan(const Description& model, size_t threads);
  size_t lay_out(const Description& model, size_t threads);  // -> rows that are copied
  uint8_t* memory_for(size_t bytes);

  const uint64_t limit_;
  std::vector<uint64_t> seen_;  // last, of those that the copy does not hold
  size_t times_ = 0;
  size_t reads_ = SIZE_MAX / 2;  // of the copy; the first one is as if one before had paid
  std::vector<uint64_t> copied_;
  size_t neurons_ = 0;  // in the copy
  bool planned_ = false, stale_ = false;
  uint32_t most_rows_ = 0;
  std::vector<CopiedLayer> layers_;

  // Not zeroed: the threads that copy are the first ones to touch it.
  std::unique_ptr<uint8_t, decltype(&std::free)> memory_{nullptr, &std::free};
  size_t bytes_ = 0;
};

}  // namespace sk
