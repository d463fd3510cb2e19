// What a pass tells.
#include <algorithm>

#include "forward.hpp"

namespace sk {
namespace cuda {

int32_t Pass::head(uint32_t first, uint32_t count) {
  SK_TRY(head_logits(m_, output_rows_ + first, count));
  SK_TRY(tick(SK_PHASE_HEAD));
  const Buffers& b = m_.buffers;
  const uint32_t kept = std::min<uint32_t>(SK_NUM_CANDIDATES, shape_.vocab);
  CandidatesArgs args = {b.logits,
                         count,
                         shape_.vocab,
                         kept,
                         temperatures_ + first,
                         b.candidate_ids,
                         b.candidate_logits,
                         b.normalizers,
                         b.normalizers + kHeadRows};
  SK_TRY(start("candidates", {count, 1, 1}, args));
  Pieces sizes(nullptr);
  const auto land = [&](Pieces pieces, float** logits, int32_t** ids, float** values,
                        float** normalizers) {
    *logits = pieces.take<float>(size_t{count} * shape_.vocab);
    *ids = pieces.take<int32_t>(size_t{count} * kept);
    *values = pieces.take<float>(size_t{count} * kept);
    *normalizers = pieces.take<float>(2 * size_t{kHeadRows});
    return pieces.used();
  };
  float *logits, *values, *normalizers;
  int32_t* ids;
  SK_TRY(m_.landing.reserve(land(sizes, &logits, &ids, &values, &normalizers)));
  land(Pieces(m_.landing.data()), &logits, &ids, &values, &normalizers);
  const auto bring = [&](void* to, const void* from, size_t bytes) {
    return copy_out(m_.device, m_.stream, to, from, bytes);
  };
  SK_TRY(bring(logits, b.logits, size_t{count} * shape_.vocab * sizeof(float)));
  SK_TRY(bring(ids, b.candidate_ids, size_t{count} * kept * sizeof(int32_t)));
  SK_TRY(bring(values, b.candidate_logits, size_t{count} * kept * sizeof(float)));
  SK_TRY(bring(normalizers, b.normalizers, 2 * size_t{kHeadRows} * sizeof(float)));
  SK_TRY(wait(m_.device, m_.stream));
  for (uint32_t i = 0; i < count; ++i) {
    const size_t place = output_places_[first + i];
    std::copy_n(logits + size_t{i} * shape_.vocab, shape_.vocab,
                args_.logits + place * shape_.vocab);
    std::copy_n(ids + size_t{i} * kept, kept, args_.candidate_ids + place * kept);
    std::copy_n(values + size_t{i} * kept, kept, args_.candidate_logits + place * kept);
    args_.log_normalizers[place] = normalizers[i];
    args_.log_normalizers_1[place] = normalizers[kHeadRows + i];
    if (args_.needed != nullptr) args_.rescored[place] = shape_.vocab;
  }
  return tick(SK_PHASE_CANDIDATES);
}

int32_t Pass::tell() {
  const size_t layers = m_.layers.size();
  // sums_, reads_ and hidden_out_ are pieces of one memory, which comes in one copy.
  if (result_bytes_ == 0) return SK_STATUS_OK;
  SK_TRY(m_.landing.reserve(result_bytes_));
  SK_TRY(copy_out(m_.device, m_.stream, m_.landing.data(), m_.results.data(), result_bytes_));
  SK_TRY(wait(m_.device, m_.stream));
  const auto landed = [&](const auto* piece) {
    return reinterpret_cast<decltype(piece)>(
        m_.landing.data() + (reinterpret_cast<const uint8_t*>(piece) - m_.results.data()));
  };
  const size_t block_sums = layers * shape_.widest;
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
  return SK_STATUS_OK;
}

}  // namespace cuda
}  // namespace sk
