// The LM head by its coarse copy: all rows are multiplied roughly, and those that may be among a
// row's best candidates exactly. See `scan` of sk_model_args and `needed` of sk_forward_args.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "matrix.hpp"
#include "model.hpp"

namespace sk {

// The scan that `args` describe, if any, checked. Throws std::bad_alloc.
int32_t take_scan(const sk_model_args& args, const MatrixKinds& kinds, Model* model);

// One forward's. Every function but plan(), worthwhile() and tiles() is for one output row, unit or
// tile, and may run beside itself on others; between two functions stands a barrier.
class Scan {
 public:
  static bool wanted(const Model& model, const sk_forward_args& args);
  static size_t scratch_floats(const Model& model);
  Scan(Model& model, const sk_forward_args& args);  // throws std::bad_alloc

  // The input of an output row: normed [hidden].
  void prepare(size_t output, const float* normed, float* scratch);
  // A unit of the vocabulary for all outputs, roughly.
  void multiply(size_t unit, float* scratch);
  // The likeliest as it seems are to be rescored.
  void pick(size_t output) noexcept;
  // On one thread: what is to be rescored is laid out in tiles.
  void plan();
  size_t tiles() const { return tile_ends_.back(); }
  void rescore(size_t tile, float* scratch);
  // And after that whatever may still be better than what was found.
  void collect(size_t output) noexcept;
  // Not where so much is to be rescored that the whole LM head is better.
  bool worthwhile() const { return worthwhile_; }
  // The candidates.
  void finish(size_t output) noexcept;

  bool out_of_memory() const { return out_of_memory_; }

 private:
  struct Output {
    std::vector<uint32_t> ids;  // rows of the LM head
    std::vector<float> logits;  // of those, exact
    size_t begin = 0;           // the first that is not rescored yet
    float along, across;        // by which its errors are multiplied
    bool finite;
  };

  // Throws std::bad_alloc.
  void collect_within_reach(size_t output);

  Model& m_;
  const sk_forward_args& args_;
  size_t exact_bytes_;      // of an input of the LM head
  void *operand_, *exact_;  // of the scan; of the LM head, each on its own
  std::vector<Output> outputs_;
  std::vector<size_t> tile_ends_;  // of each output's tiles
  size_t most_;                    // rows that are rescored at most
  bool worthwhile_ = true;
  std::atomic<bool> out_of_memory_{false};
};

}  // namespace sk
