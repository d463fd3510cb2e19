// A decoder in the memory of a GPU.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <memory>
#include <mutex>
#include <vector>

#include "arguments.hpp"
#include "description.hpp"
#include "graphs.hpp"
#include "memory.hpp"

namespace sk {
namespace cuda {

// Rows of a batch that go through all layers together; more are passes one after another, which
// change nothing: what a row computes does not depend on the others, and earlier rows' KV is there.
constexpr uint32_t kPassRows = 256;
// Rows of a step that may become a graph, at most.
constexpr uint32_t kGraphRows = 32;
// Rows whose logits are in memory at once.
constexpr uint32_t kHeadRows = SK_LEFT_LOGITS;

// Of a low-rank term.
struct Basis {
  const uint8_t* rows = nullptr;
  uint64_t stride = 0;
};

struct DeviceLayer {
  Weights qkv, output, gate, up, down;
  Basis qkv_basis, output_basis, gate_up_basis, down_basis;
  const float *attention_norm, *mlp_norm, *qkv_bias, *output_bias, *down_bias, *q_norm, *k_norm;
  const float *planes_factors, *gate_factors;
  const Correction* corrections;  // [num_corrections]
  uint32_t slices;                // of the down product's neurons
};

// What a pass works in, for kPassRows rows.
struct Buffers {
  float *x, *projected, *queries, *normed, *activations, *parts, *cos, *sin, *squares, *z, *logits;
  uint8_t* halves;
  float *operand_scales, *operand_offsets;
  uint16_t* masks;
  uint8_t* head_results;  // of kHeadRows rows, see HeadResults
  float *chunk_values, *chunk_largest, *chunk_total;
};

struct Model {
  static constexpr char kStaysBehind[] = "a GPU's memory does not come along";
  explicit Model(uint32_t number)
      : device(number),
        weights(number),
        work(number),
        chunks(number),
        step(number),
        results(number),
        staging(number),
        landing(number),
        graphs(number) {}
  ~Model();

  uint32_t device;
  uint64_t stream = 0;
  bool own_stream = false;
  // Sizes and flags; its pointers are of the caller's memory, which may be gone.
  Description shape;
  std::vector<DeviceLayer> layers;
  const float *norm, *frequencies;
  Weights embedding, lm_head;
  uint32_t num_corrections;
  uint32_t parts_stride, normed_stride, neurons /* widest, in whole blocks */, groups /* most */;
  Buffers buffers;
  // Of each output of the last forward, where it left logits: the row of buffers.logits.
  std::vector<uint32_t> left_logits;

  DeviceMemory weights, work, chunks;
  DeviceMemory step, results;     // what a forward brings, and what it takes away
  PinnedMemory staging, landing;  // the host's side of both
  Graphs graphs;                  // which use all of these

  std::mutex mutex;  // one forward at a time
  bool ended = false;
  const pid_t process = getpid();
};

// Checks, and copies all weights. Throws std::bad_alloc.
int32_t make_model(const sk_model_args& args, std::shared_ptr<Model>* out);

int32_t run_forward(Model& model, const sk_forward_args& args);
int32_t run_logits(Model& model, const sk_logits_args& args);
int32_t tell_left_logits(Model& model, uint32_t row, float* logits);

}  // namespace cuda
}  // namespace sk
