// What a pass tells.
#include <algorithm>

#include "forward.hpp"

namespace sk {
namespace cuda {

HeadResults head_results(const Description& shape, uint32_t rows, uint8_t* at) {
  const size_t numbers = size_t{rows} * kept_candidates(shape);
  HeadResults out = {};
  out.ids = reinterpret_cast<int32_t*>(at);
  out.values = reinterpret_cast<float*>(at) + numbers;
  out.normalizers = out.values + numbers;
  out.normalizers_1 = out.normalizers + rows;
  return out;
}

int32_t Pass::tell() {
  uint32_t first = 0;
  do {
    if (first != 0) SK_TRY(head(first));
    SK_TRY(bring(first));
    if (first == 0) tell_results();
    tell_head(first);
    SK_TRY(tick(SK_PHASE_CANDIDATES));
    first += kHeadRows;
  } while (first < outputs_.size());
  return SK_STATUS_OK;
}

int32_t Pass::bring(uint32_t first) {
  const uint32_t count = head_rows(first);
  const size_t result_bytes = first == 0 ? result_bytes_ : 0;
  const size_t head_bytes = head_results_bytes(shape_, count);
  const size_t logits_bytes =
      args_.logits == nullptr ? 0 : size_t{count} * shape_.vocab * sizeof(float);
  const auto place = [&](uint8_t* base) {
    Pieces pieces(base);
    landed_results_ = pieces.take<uint8_t>(result_bytes);
    landed_head_ = pieces.take<uint8_t>(head_bytes);
    landed_logits_ = pieces.take<uint8_t>(logits_bytes);
    return pieces.used();
  };
  SK_TRY(m_.landing.reserve(place(nullptr)));
  place(m_.landing.data());
  const auto copy = [&](void* to, const void* from, size_t bytes) -> int32_t {
    return bytes == 0 ? SK_STATUS_OK : copy_out(m_.device, m_.stream, to, from, bytes);
  };
  SK_TRY(copy(landed_results_, m_.results.data(), result_bytes));
  SK_TRY(copy(landed_head_, m_.buffers.head_results, head_bytes));
  SK_TRY(copy(landed_logits_, logits_of(first), logits_bytes));
  // Also where nothing is brought: the next pass writes over what this one sent from.
  return wait(m_.device, m_.stream);
}

void Pass::tell_results() {
  // sums_, reads_ and hidden_out_ are pieces of one memory.
  const auto landed = [&](const auto* piece) {
    return reinterpret_cast<decltype(piece)>(
        landed_results_ + (reinterpret_cast<const uint8_t*>(piece) - m_.results.data()));
  };
  const size_t layers = m_.layers.size(), block_sums = layers * shape_.widest;
  for (size_t i = 0; i < units_.size(); ++i) {
    const int64_t* from = landed(sums_) + i * block_sums;
    for (size_t j = 0; j < block_sums; ++j) unit_sums_[i][j] += from[j];
  }
  for (uint32_t s = 0; choosing_ && s <= args_.num_sequences; ++s) {
    uint64_t* to = s < args_.num_sequences ? args_.sequences[s].reads : args_.union_reads;
    const uint64_t* from = landed(reads_) + s * layers * kReadKinds;
    for (size_t i = 0; to != nullptr && i < layers * kReadKinds; ++i) to[i] += from[i];
  }
  for (size_t i = 0; i < hidden_.size(); ++i) {
    std::copy_n(landed(hidden_out_) + i * shape_.hidden, shape_.hidden,
                args_.hidden + size_t{hidden_places_[i]} * shape_.hidden);
  }
}

void Pass::tell_head(uint32_t first) {
  const uint32_t count = head_rows(first), vocab = shape_.vocab, kept = kept_candidates(shape_);
  const HeadResults from = head_results(shape_, count, landed_head_);
  const auto* logits = reinterpret_cast<const float*>(landed_logits_);
  for (uint32_t i = 0; i < count; ++i) {
    const size_t place = output_places_[first + i];
    if (args_.logits != nullptr) {
      std::copy_n(logits + size_t{i} * vocab, vocab, args_.logits + place * vocab);
    } else {
      m_.left_logits[place] = left_before_ + first + i;
    }
    std::copy_n(from.ids + size_t{i} * kept, kept, args_.candidate_ids + place * kept);
    std::copy_n(from.values + size_t{i} * kept, kept, args_.candidate_logits + place * kept);
    args_.log_normalizers[place] = from.normalizers[i];
    args_.log_normalizers_1[place] = from.normalizers_1[i];
    if (args_.needed != nullptr) args_.rescored[place] = vocab;
  }
}

}  // namespace cuda
}  // namespace sk
