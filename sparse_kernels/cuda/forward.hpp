// A pass: some rows of a batch through all layers. What it computes and where that stands is in
// pass_layout.cpp, its launches in launches.cpp, what it tells in results.cpp.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "step.hpp"

namespace sk {
namespace cuda {

inline uint32_t blocks_of(uint32_t count, uint32_t unit) { return (count + unit - 1) / unit; }

inline uint32_t kept_candidates(const Description& shape) {
  return std::min<uint32_t>(SK_NUM_CANDIDATES, shape.vocab);
}

// What `candidates` writes of some rows, in one piece of memory.
struct HeadResults {
  int32_t* ids;                        // [rows, kept]
  float* values;                       // [rows, kept]
  float *normalizers, *normalizers_1;  // [rows]
};
HeadResults head_results(const Description& shape, uint32_t rows, uint8_t* at);
inline size_t head_results_bytes(const Description& shape, uint32_t rows) {
  return 2 * size_t{rows} * (size_t{kept_candidates(shape)} + 1) * sizeof(float);
}

// Rows [first, first + count) of the tokens of all sequences.
struct PassRows {
  uint32_t first, count;
};

class Pass {
 public:
  Pass(Model& model, const sk_forward_args& args, PassRows rows);
  // Throws std::bad_alloc.
  int32_t run();

 private:
  using Clock = std::chrono::steady_clock;

  void lay_out();
  void lay_out_statistics(uint32_t sequence, uint32_t begin, uint32_t end);
  // Whether a graph may do it: see sk_graphs_info.
  bool may_repeat() const;
  StepKey key() const;
  int32_t send();
  int32_t reserve_chunks();
  int32_t reserve_results();

  // Launches; the first failure ends the pass.
  int32_t launch_all();
  int32_t embed();
  int32_t layer(uint32_t index);
  int32_t attention(uint32_t index);
  int32_t feed_forward(uint32_t index);
  int32_t end();
  int32_t head(uint32_t first);

  int32_t tell();
  // Copies from the device what is there after head(first), and the results, and waits.
  int32_t bring(uint32_t first);
  void tell_results();
  void tell_head(uint32_t first);
  // Where head(first) writes logits: those that stay are side by side, of all passes.
  float* logits_of(uint32_t first) const {
    const size_t row = args_.logits == nullptr ? left_before_ + first : 0;
    return m_.buffers.logits + row * shape_.vocab;
  }
  uint32_t head_rows(uint32_t first) const {
    return std::min<uint32_t>(kHeadRows, static_cast<uint32_t>(outputs_.size()) - first);
  }

  // The residual gets the sums of a layer's down product.
  void with_parts(PrepareArgs* args, uint32_t layer) const;
  uint8_t* kv_of(uint32_t layer) const;
  int32_t tick(sk_phase phase);

  template <typename Args>
  int32_t start(const char* kernel, Grid grid, const Args& args) {
    return launch(m_.device, m_.stream, kernel, grid, &args, sizeof(args));
  }

  Model& m_;
  const sk_forward_args& args_;
  const Description& shape_;
  const PassRows rows_;
  Step step_;
  Clock::time_point mark_;

  std::vector<Token> tokens_;
  std::vector<uint32_t> outputs_, output_places_, hidden_, hidden_places_;
  std::vector<StatisticsUnit> units_;
  std::vector<int64_t*> unit_sums_;  // on the host, of each unit
  bool choosing_ = false, planes_ = false, repeats_ = false;
  std::vector<CorrectionArgs> corrections_;  // [layers], where a sequence wants one
  uint32_t most_chunks_ = 1, attention_rows_ = 1;

  const Token* device_tokens_ = nullptr;
  const int32_t* block_tables_ = nullptr;
  const uint32_t* table_begin_ = nullptr;
  const Choice* choices_ = nullptr;
  const uint32_t *output_rows_ = nullptr, *hidden_rows_ = nullptr;
  const float* temperatures_ = nullptr;
  const StatisticsUnit* device_units_ = nullptr;
  const CorrectionArgs* device_corrections_ = nullptr;

  uint32_t left_before_ = 0;  // rows of logits that earlier passes left

  // On the host.
  uint8_t *landed_results_ = nullptr, *landed_head_ = nullptr, *landed_logits_ = nullptr;

  // Of one memory, `result_bytes_` long.
  size_t result_bytes_ = 0;
  int64_t* sums_ = nullptr;      // [units, layers, widest]
  uint64_t* reads_ = nullptr;    // [sequences + 1, layers, kReadKinds]
  float* hidden_out_ = nullptr;  // [hidden rows, hidden]
};

// The kernel for so many rows of a batch, and blocks that they make.
enum Product : uint32_t { kDot = 0, kActivate = 1, kDown = 2 };
const char* kernel_for(Product product, const Weights& weights, uint32_t rows, uint32_t* blocks);

// Rows of x, normed by the last norm, through the LM head -> logits. At most kHeadRows.
int32_t head_logits(Model& model, const uint32_t* row_list, uint32_t rows, float* logits);

}  // namespace cuda
}  // namespace sk
