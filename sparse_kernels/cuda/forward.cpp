#include "forward.hpp"

#include <algorithm>
#include <cstring>

namespace sk {
namespace cuda {

namespace {

uint32_t power_of_two(uint32_t at_least) {
  uint32_t power = 1;
  while (power < at_least) power *= 2;
  return power;
}

}  // namespace

Pass::Pass(Model& model, const sk_forward_args& args, PassRows rows)
    : m_(model), args_(args), shape_(model.shape), rows_(rows), step_(model) {}

int32_t Pass::run() {
  mark_ = Clock::now();
  lay_out();
  repeats_ = m_.graphs.on() && may_repeat();
  // Blocks beyond a row's chunks do nothing, so that longer contexts come with the same graph.
  if (repeats_) most_chunks_ = power_of_two(most_chunks_);
  SK_TRY(reserve_chunks());
  SK_TRY(reserve_results());
  SK_TRY(send());
  const auto launches = [this] { return launch_all(); };
  SK_TRY(repeats_ ? m_.graphs.run(m_.stream, key(), launches) : launches());
  return tell();
}

int32_t run_forward(Model& model, const sk_forward_args& args) {
  model.left_logits.assign(args.logits == nullptr ? args.num_outputs : 0, 0);
  if (args.phase_seconds != nullptr) std::fill_n(args.phase_seconds, SK_NUM_PHASES, 0.0);
  uint32_t rows = 0;
  bool choosing = false;
  for (uint32_t s = 0; s < args.num_sequences; ++s) {
    rows += args.sequences[s].num_tokens;
    choosing = choosing || args.sequences[s].choice != nullptr;
  }
  for (size_t i = 0; args.union_reads != nullptr && i < model.layers.size() * kReadKinds; ++i) {
    args.union_reads[i] = choosing ? 0 : model.shape.layers[i / kReadKinds].neurons;
  }
  for (uint32_t first = 0; first < rows; first += kPassRows) {
    const int32_t status = Pass(model, args, {first, std::min(kPassRows, rows - first)}).run();
    if (status == SK_STATUS_OK) continue;
    model.left_logits.clear();
    return status;
  }
  return wait(model.device, model.stream);
}

int32_t run_logits(Model& model, const sk_logits_args& args) {
  model.left_logits.clear();
  const Description& shape = model.shape;
  for (uint32_t first = 0; first < args.rows; first += kHeadRows) {
    const uint32_t count = std::min(kHeadRows, args.rows - first);
    const size_t bytes = size_t{count} * shape.hidden * sizeof(float);
    SK_TRY(model.staging.reserve(bytes));
    std::memcpy(model.staging.data(), args.hidden + size_t{first} * shape.hidden, bytes);
    SK_TRY(copy_in(model.device, model.stream, model.buffers.x, model.staging.data(), bytes));
    SK_TRY(head_logits(model, nullptr, count, model.buffers.logits));
    const size_t numbers = size_t{count} * shape.vocab;
    SK_TRY(model.landing.reserve(numbers * sizeof(float)));
    SK_TRY(copy_out(model.device, model.stream, model.landing.data(), model.buffers.logits,
                    numbers * sizeof(float)));
    SK_TRY(wait(model.device, model.stream));
    std::copy_n(reinterpret_cast<const float*>(model.landing.data()), numbers,
                args.logits + size_t{first} * shape.vocab);
  }
  return SK_STATUS_OK;
}

int32_t tell_left_logits(Model& model, uint32_t row, float* logits) {
  if (row >= model.left_logits.size()) {
    return fail(SK_STATUS_BAD_VALUE, "row is %" PRIu32 "; logits of %zu rows were left", row,
                model.left_logits.size());
  }
  const size_t vocab = model.shape.vocab, bytes = vocab * sizeof(float);
  SK_TRY(model.landing.reserve(bytes));
  SK_TRY(copy_out(model.device, model.stream, model.landing.data(),
                  model.buffers.logits + model.left_logits[row] * vocab, bytes));
  SK_TRY(wait(model.device, model.stream));
  std::copy_n(reinterpret_cast<const float*>(model.landing.data()), vocab, logits);
  return SK_STATUS_OK;
}

}  // namespace cuda
}  // namespace sk
