// What a pass computes, and where it stands in memory.
#include <algorithm>

#include "forward.hpp"

namespace sk {
namespace cuda {
namespace {

constexpr size_t kChunkBytes =
    64 << 20;  // of attention's partial results, unless one row needs more

}  // namespace

void Pass::lay_out() {
  uint32_t row = 0;
  const uint32_t last = rows_.first + rows_.count;
  for (uint32_t s = 0; s < args_.num_sequences; ++s) {
    const sk_sequence& sequence = args_.sequences[s];
    const uint32_t begin = std::max(row, rows_.first);
    const uint32_t end = std::min(row + sequence.num_tokens, last);
    for (uint32_t i = begin; i < end; ++i) {
      const uint32_t token = i - row, position = sequence.start + token;
      tokens_.push_back({sequence.token_ids[token], position, s, row});
      most_chunks_ = std::max(most_chunks_, position / kChunk + 1);
    }
    if (begin < end && sequence.statistics != nullptr) {
      lay_out_statistics(s, begin - row, end - row);
    }
    if (sequence.choice != nullptr) {
      choosing_ = true;
      planes_ = planes_ || sequence.choice->kind == SK_CHOICE_PLANES;
      if (sequence.choice->correction != 0) corrections_.resize(m_.layers.size());
    }
    row += sequence.num_tokens;
  }
  const auto take = [&](const uint32_t* all, uint32_t count, std::vector<uint32_t>* own,
                        std::vector<uint32_t>* places) {
    for (uint32_t i = 0; i < count; ++i) {
      if (all[i] < rows_.first || all[i] >= last) continue;
      own->push_back(all[i] - rows_.first);
      places->push_back(i);
    }
  };
  left_before_ = static_cast<uint32_t>(
      std::count_if(args_.output_rows, args_.output_rows + args_.num_outputs,
                    [&](uint32_t row_of_output) { return row_of_output < rows_.first; }));
  take(args_.output_rows, args_.num_outputs, &outputs_, &output_places_);
  take(args_.hidden_rows, args_.num_hidden, &hidden_, &hidden_places_);
}

void Pass::lay_out_statistics(uint32_t index, uint32_t begin, uint32_t end) {
  const sk_sequence& sequence = args_.sequences[index];
  const size_t block_sums = m_.layers.size() * shape_.widest;
  const uint32_t first_block = sequence.start / SK_BLOCK_SIZE;
  const uint32_t first_row = static_cast<uint32_t>(tokens_.size()) - (end - begin);
  for (uint32_t i = begin; i < end;) {
    const uint32_t position = sequence.start + i, block = position / SK_BLOCK_SIZE;
    const uint32_t stop = std::min(end, (block + 1) * SK_BLOCK_SIZE - sequence.start);
    // The attention sink, position 0, counts nowhere.
    const uint32_t from = position == 0 ? i + 1 : i;
    if (from < stop) {
      StatisticsUnit unit = {};
      unit.row = first_row + from - begin;
      unit.count = stop - from;
      unit.score = sequence.score;
      unit.share = sequence.score_share;
      units_.push_back(unit);
      unit_sums_.push_back(sequence.statistics + (block - first_block) * block_sums);
    }
    i = stop;
  }
}

bool Pass::may_repeat() const {
  return args_.prompts == 0 && args_.phase_seconds == nullptr && units_.empty() &&
         hidden_.empty() && rows_.first == 0 && rows_.count <= kGraphRows;
}

StepKey Pass::key() const {
  StepKey key = {};
  key.rows = rows_.count;
  key.sequences = args_.num_sequences;
  key.outputs = static_cast<uint32_t>(outputs_.size());
  key.chunks = most_chunks_;
  key.kv_blocks = args_.kv_num_blocks;
  key.choosing = choosing_;
  key.planes = planes_;
  key.corrections = !corrections_.empty();
  key.kv = args_.kv;
  key.step = m_.step.data();
  key.chunk_results = m_.chunks.data();
  key.results = m_.results.data();
  return key;
}

int32_t Pass::reserve_chunks() {
  size_t of_row = 0;
  for (const Layer& layer : shape_.layers) {
    of_row =
        std::max(of_row, size_t{layer.heads} * most_chunks_ * (shape_.dim + 2) * sizeof(float));
  }
  attention_rows_ = static_cast<uint32_t>(
      std::clamp<size_t>(kChunkBytes / of_row, 1, std::max<uint32_t>(rows_.count, 1)));
  SK_TRY(m_.chunks.reserve(std::max(kChunkBytes, of_row)));
  const size_t rows = size_t{attention_rows_} * shape_.most_heads * most_chunks_;
  Buffers& b = m_.buffers;
  b.chunk_values = reinterpret_cast<float*>(m_.chunks.data());
  b.chunk_largest = b.chunk_values + rows * shape_.dim;
  b.chunk_total = b.chunk_largest + rows;
  return SK_STATUS_OK;
}

int32_t Pass::reserve_results() {
  const size_t layers = m_.layers.size();
  const auto place = [&](uint8_t* base) {
    Pieces pieces(base);
    sums_ = pieces.take<int64_t>(units_.size() * layers * shape_.widest);
    reads_ = pieces.take<uint64_t>(choosing_ ? (args_.num_sequences + 1) * layers * kReadKinds : 0);
    hidden_out_ = pieces.take<float>(hidden_.size() * shape_.hidden);
    return pieces.used();
  };
  result_bytes_ = place(nullptr);
  SK_TRY(m_.results.reserve(result_bytes_));
  place(m_.results.data());
  for (size_t i = 0; i < units_.size(); ++i) units_[i].sums = sums_ + i * layers * shape_.widest;
  return SK_STATUS_OK;
}

int32_t Pass::send() {
  std::vector<int32_t> tables;
  std::vector<uint32_t> begins;
  for (uint32_t s = 0; s < args_.num_sequences; ++s) {
    const sk_sequence& sequence = args_.sequences[s];
    begins.push_back(static_cast<uint32_t>(tables.size()));
    const uint32_t blocks = blocks_of(sequence.start + sequence.num_tokens, SK_BLOCK_SIZE);
    tables.insert(tables.end(), sequence.block_table, sequence.block_table + blocks);
  }
  std::vector<float> temperatures;
  for (uint32_t place : output_places_) temperatures.push_back(args_.temperatures[place]);
  std::vector<Choice> choices(choosing_ ? args_.num_sequences : 0, Choice{});
  std::vector<size_t> cores(choices.size()), thresholds(choices.size());
  for (size_t s = 0; s < choices.size(); ++s) {
    const sk_choice* from = args_.sequences[s].choice;
    if (from == nullptr) continue;
    choices[s].choosing = 1;
    choices[s].kind = from->kind;
    choices[s].correction = from->correction;
  }
  const size_t tokens = step_.add(tokens_), begin = step_.add(begins),
               outputs = step_.add(outputs_), hidden = step_.add(hidden_),
               cold = step_.add(temperatures), units = step_.add(units_),
               chosen = step_.add(choices), corrections = step_.add(corrections_);
  // Trap: what stands above is as large in all steps of a StepKey, so that its places are fixed.
  // Of what may be larger in one than in another, kernels are told by what stands above, but for
  // the beginning of the tables.
  const size_t table = step_.add(tables);
  for (size_t s = 0; s < choices.size(); ++s) {
    const sk_choice* from = args_.sequences[s].choice;
    if (from == nullptr) continue;
    cores[s] = step_.add(from->core, from->core_count);
    thresholds[s] = step_.add(from->thresholds, from->thresholds_count);
  }
  SK_TRY(step_.reserve());
  device_tokens_ = step_.at<Token>(tokens);
  block_tables_ = step_.at<int32_t>(table);
  table_begin_ = step_.at<uint32_t>(begin);
  output_rows_ = step_.at<uint32_t>(outputs);
  hidden_rows_ = step_.at<uint32_t>(hidden);
  temperatures_ = step_.at<float>(cold);
  device_units_ = step_.at<StatisticsUnit>(units);
  choices_ = step_.at<Choice>(chosen);
  device_corrections_ = step_.at<CorrectionArgs>(corrections);
  for (size_t s = 0; s < choices.size(); ++s) {
    const sk_choice* from = args_.sequences[s].choice;
    if (from == nullptr) continue;
    Choice* to = step_.edit<Choice>(chosen) + s;
    if (from->core != nullptr) to->core = step_.at<uint64_t>(cores[s]);
    if (from->thresholds != nullptr) to->thresholds = step_.at<float>(thresholds[s]);
  }
  for (size_t i = 0; i < corrections_.size(); ++i) {
    CorrectionArgs& to = corrections_[i];
    to.of_number = m_.layers[i].corrections;
    to.tokens = device_tokens_;
    to.choices = choices_;
    to.z = m_.buffers.z;
    to.normed = m_.buffers.normed;
    to.normed_stride = m_.normed_stride;
    to.hidden = shape_.hidden;
    to.rows = rows_.count;
    step_.edit<CorrectionArgs>(corrections)[i] = to;
  }
  SK_TRY(step_.send());
  if (units_.empty()) return SK_STATUS_OK;
  return clear(m_.device, m_.stream, sums_,
               units_.size() * m_.layers.size() * shape_.widest * sizeof(int64_t));
}
}  // namespace cuda
}  // namespace sk
