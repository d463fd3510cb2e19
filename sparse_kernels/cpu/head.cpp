#include "head.hpp"

#include <algorithm>
#include <atomic>

namespace sk {

void head_rows(const Model& m, const Matrix& matrix, const void* operand, size_t count, size_t unit,
               float* scratch, float* logits) {
  const size_t first = unit * kHeadRows;
  const size_t rows = std::min<size_t>(kHeadRows, round_up(m.vocab - first, SK_ROW_TILE));
  const bool whole = first + rows <= m.vocab;  // nothing beyond a row of logits may be written
  float* out = whole ? logits + first : scratch;
  const size_t stride = whole ? m.vocab : kHeadRows;
  matrix.products->dot(&matrix, first, rows, operand, count, out, stride);
  if (whole) return;
  for (size_t i = 0; i < count; ++i) {
    std::copy_n(scratch + i * stride, m.vocab - first, logits + i * m.vocab + first);
  }
}

namespace {

// The LM head on hidden states from outside.
class Head {
 public:
  Head(Model& model, const sk_logits_args& args) : m_(model), args_(args) {
    operand_ = m_.output_operand.get(m_.lm_head.products->operand_bytes(&m_.lm_head, args.rows));
    for (Scratch& scratch : m_.scratch) scratch.get<float>(args.rows * kHeadRows + m_.columns);
  }

  void run() {
    m_.pool.run([](void* self, uint32_t index) { static_cast<Head*>(self)->work(index); }, this);
  }

 private:
  void work(uint32_t index) {
    const Kernels& kernels = *m_.kernels;
    float* normed = m_.scratch[index].get<float>(0);
    kernels.begin_thread();
    for (size_t i = index; i < args_.rows; i += m_.pool.threads()) {
      kernels.rms_norm(args_.hidden + i * m_.hidden, m_.norm, m_.hidden, m_.eps, normed);
      m_.lm_head.products->store_operand(&m_.lm_head, normed, m_.hidden, i, args_.rows, operand_);
    }
    m_.barrier.arrive_and_wait([] {});
    for (;;) {
      const size_t unit = next_unit_.fetch_add(1, std::memory_order_relaxed);
      if (unit >= head_units(m_)) break;
      head_rows(m_, m_.lm_head, operand_, args_.rows, unit, normed + m_.columns, args_.logits);
    }
    kernels.end_thread();
  }

  Model& m_;
  const sk_logits_args& args_;
  void* operand_;
  std::atomic<size_t> next_unit_{0};
};

}  // namespace

void run_head(Model& model, const sk_logits_args& args) { Head(model, args).run(); }

}  // namespace sk
