// The neurons that are in the core of a sequence that decodes, or of any of several, side by side.
// Chosen rows are spread over memory: the CPU's own prefetching does not foresee them, and each
// step gathers them anew. A copy is read from its beginning to its end, as all neurons are. The
// bits are the same either way.
#pragma once

#include <cstdint>
#include <vector>

#include "description.hpp"
#include "scratch.hpp"

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
  Matrix down;  // its codes alone are copied: scales stay by neuron
  // [blocks] the row of a block's first neuron, a multiple of SK_ROW_TILE where a unit begins.
  // Empty where all neurons are in the core: there is no copy.
  std::vector<uint32_t> starts;
};

class CoreCopy {
 public:
  explicit CoreCopy(bool wanted) : wanted_(wanted) {}
  // Sees what is in the core [layers, words] of any sequence of a forward. True: the copy is to be
  // used, and where `stale`, all its layers are copied before. False: this is another core than the
  // last forward's, or there is no memory.
  bool take(const Description& model, size_t threads, size_t sequences, const uint64_t* core);
  bool stale() const { return stale_; }
  void copy_layer(const Description& model, size_t index);
  void copied() { stale_ = false; }

  const CopiedLayer& layer(size_t index) const { return layers_[index]; }
  uint32_t most_rows() const { return most_rows_; }  // of a unit

 private:
  bool plan(const Description& model, size_t threads);
  uint64_t mask(const Description& model, size_t layer, size_t block) const;

  const bool wanted_;
  std::vector<uint64_t> core_;  // seen last
  size_t seen_ = 0;             // in so many forwards
  bool planned_ = false, refused_ = false, stale_ = false;
  uint32_t most_rows_ = 0;
  std::vector<CopiedLayer> layers_;
  Scratch memory_;
};

}  // namespace sk
