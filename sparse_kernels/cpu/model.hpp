// A decoder as the ABI describes it, checked, and what a forward needs beside it.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core_copy.hpp"
#include "description.hpp"
#include "kernels.hpp"
#include "scratch.hpp"
#include "sparse_kernels.h"
#include "thread_pool.hpp"

namespace sk {

// A coarse copy of the LM head, and how far off its products can be. See sk_model_args.
struct ScanHead {
  bool used = false;
  Matrix matrix, basis;
  std::vector<double> gram;  // [SK_SCAN_DIRECTIONS, SK_SCAN_DIRECTIONS]: U U^T
  double basis_error;        // |U x - z| <= this |x|, for the z that is computed
  std::vector<float> along,
      across;  // [vocab] a row's error per |z| + basis_error |x|, per |x - U^T z|
};

struct Model : Description {
  static constexpr char kStaysBehind[] = "its threads did not come along";
  Model(uint32_t thread_count, uint64_t core_copy_bytes)
      : pool(thread_count),
        barrier(thread_count),
        scratch(thread_count),
        core_copy(core_copy_bytes) {}

  ScanHead scan;
  const Kernels* kernels;
  sk_isa isa;
  const KvFormat* kv;

  std::mutex mutex;                // one forward at a time
  bool ended = false;              // by sk_model_destroy; read and written under `mutex`
  const pid_t process = getpid();  // a fork takes only the calling thread along, not the pool's
  ThreadPool pool;
  SpinBarrier barrier;  // of the threads inside a forward
  // Buffers of a forward, see forward.cpp.
  Scratch x, operand, attention_operand, queries, mixed, partial, activations, plain, cos, sin,
      chunk_state, output_operand, reduced, scan_operand, scan_inputs, correction_operand, squares;
  std::vector<Scratch> scratch;  // of each thread
  CoreCopy core_copy;
};

}  // namespace sk
