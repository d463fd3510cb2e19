// A decoder as the ABI describes it, checked, and what a forward needs beside it.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.hpp"
#include "sparse_kernels.h"
#include "thread_pool.hpp"

namespace sk {

constexpr size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Memory that only grows, aligned and zeroed when it does.
class Scratch {
 public:
  ~Scratch();
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Throws std::bad_alloc. What was in it is lost when it grows.
  void* get(size_t bytes);
  template <typename T>
  T* get(size_t count) {
    return static_cast<T*>(get(count * sizeof(T)));
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

struct Layer {
  uint32_t heads, kv_heads, neurons, blocks, partitions, window;
  Matrix qkv, output, gate, up, down;
  Matrix qkv_basis, output_basis, gate_up_basis, down_basis;  // of their low-rank terms
  const float *attention_norm, *mlp_norm, *qkv_bias, *output_bias, *q_norm, *k_norm;
  // For choices by planes, if planes_factors is not empty: gate and up by their upper bits.
  Matrix gate_high, up_high;
  // And down with one number for all lower bits, in `middle`, if it is in two planes.
  Matrix down_coarse;
  std::vector<uint8_t> middle;
  std::vector<float> planes_factors, gate_factors;  // [neurons in whole blocks], zeros at the end
  size_t kv_offset;  // bytes from the beginning of KV, for each of its blocks

  // Blocks of neurons in a partition: [begin(p), begin(p + 1)).
  uint32_t partition_begin(uint32_t partition) const {
    return static_cast<uint32_t>(uint64_t{partition} * blocks / partitions);
  }
};

// What stands in for neurons that a choice leaves out of a layer.
struct Correction {
  uint32_t rank = 0;
  Matrix inputs, outputs;
};

// A coarse copy of the LM head, and how far off its products can be. See sk_model_args.
struct ScanHead {
  bool used = false;
  Matrix matrix, basis;
  std::vector<double> gram;  // [SK_SCAN_DIRECTIONS, SK_SCAN_DIRECTIONS]: U U^T
  double basis_error;        // |U x - z| <= this |x|, for the z that is computed
  std::vector<float> along,
      across;  // [vocab] a row's error per |z| + basis_error |x|, per |x - U^T z|
};

struct Model {
  Model(uint32_t thread_count) : pool(thread_count), barrier(thread_count), scratch(thread_count) {}

  uint32_t hidden, columns /* hidden rounded up */, vocab, head_dim, dim /* rounded up */;
  uint32_t widest = 0, most_heads = 0;
  float eps, rope_scale;
  std::vector<float> rope_frequencies;
  uint32_t rope_rows;
  std::vector<Layer> layers;
  std::vector<Correction> corrections;  // [number - 1][layer]
  uint32_t words;                       // of 64 neurons of the widest layer
  const float* norm;
  Matrix embedding, lm_head;
  ScanHead scan;
  sk_reduce reduce;
  const Kernels* kernels;
  sk_isa isa;
  uint32_t activation_bits;
  const KvFormat* kv;
  size_t kv_bytes;       // of one KV block in all layers
  size_t kv_head_bytes;  // of one head in it

  std::mutex mutex;                // one forward at a time
  bool ended = false;              // by sk_model_destroy; read and written under `mutex`
  const pid_t process = getpid();  // a fork takes only the calling thread along, not the pool's
  ThreadPool pool;
  SpinBarrier barrier;  // of the threads inside a forward
  // Buffers of a forward, see forward.cpp.
  Scratch x, operand, attention_operand, queries, mixed, partial, activations, plain, cos, sin,
      chunk_state, output_operand, reduced, scan_operand, scan_inputs, correction_operand, squares;
  std::vector<Scratch> scratch;  // of each thread
};

// SK_STATUS_OK, or the failure, noted: no such model, or one of another process.
int32_t find_model(uint64_t handle, std::shared_ptr<Model>* model);
int32_t no_such_model(uint64_t handle);

}  // namespace sk
