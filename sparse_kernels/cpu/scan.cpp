#include "scan.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <new>

#include "candidates.hpp"
#include "head.hpp"

namespace sk {
namespace {

constexpr size_t kPicked = 16;  // at least, for a first bound
constexpr size_t kShare = 4;  // rescoring more than 1 / kShare of the rows costs more than it saves
constexpr size_t kBlock = 4096;   // of the vocabulary, looked at in one go
constexpr double kUp = 1 + 1e-5;  // for what float32 rounds away of a bound

}  // namespace

bool Scan::wanted(const Model& model, const sk_forward_args& args) {
  if (!model.scan.used || args.needed == nullptr) return false;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < args.num_outputs && sum <= SK_SCAN_NEEDED; ++i) {
    if (args.needed[i] == 0) return false;
    sum += args.needed[i];
  }
  // With more of them so much is near the best that rescoring takes as long as the whole LM head.
  return sum != 0 && sum <= SK_SCAN_NEEDED;
}

size_t Scan::scratch_floats(const Model& m) {
  if (!m.scan.used) return 0;
  return std::max<size_t>(m.scan.matrix.columns, SK_ROW_TILE * m.lm_head.columns / 2) + SK_ROW_TILE;
}

Scan::Scan(Model& model, const sk_forward_args& args)
    : m_(model),
      args_(args),
      exact_bytes_(round_up(model.lm_head.products->operand_bytes(&model.lm_head, 1), 64)),
      operand_(model.scan_operand.get(
          model.scan.matrix.products->operand_bytes(&model.scan.matrix, args.num_outputs))),
      exact_(model.scan_inputs.get(exact_bytes_ * args.num_outputs)),
      outputs_(args.num_outputs),
      tile_ends_(args.num_outputs),
      most_(model.vocab / kShare) {}

void Scan::prepare(size_t output, const float* normed, float* scratch) {
  const ScanHead& scan = m_.scan;
  const size_t columns = m_.columns;
  uint8_t* exact = static_cast<uint8_t*>(exact_) + output * exact_bytes_;
  m_.lm_head.products->store_operand(&m_.lm_head, normed, m_.hidden, 0, 1, exact);
  std::copy_n(normed, m_.hidden, scratch);
  std::fill_n(scratch + m_.hidden, columns - m_.hidden, 0.0f);
  float* const z = scratch + columns;
  // The basis has as many columns as the LM head, so their inputs have one form.
  scan.basis.products->dot(&scan.basis, 0, SK_SCAN_DIRECTIONS, exact, 1, z, SK_SCAN_DIRECTIONS);
  scan.matrix.products->store_operand(&scan.matrix, scratch, scan.matrix.columns, output,
                                      args_.num_outputs, operand_);
  double x_squares = 0, z_squares = 0, z_gram = 0;
  for (size_t i = 0; i < m_.hidden; ++i) x_squares += double{normed[i]} * normed[i];
  for (size_t i = 0; i < SK_SCAN_DIRECTIONS; ++i) {
    const double* gram = scan.gram.data() + i * SK_SCAN_DIRECTIONS;
    double sum = 0;
    for (size_t j = 0; j < SK_SCAN_DIRECTIONS; ++j) sum += gram[j] * z[j];
    z_squares += double{z[i]} * z[i];
    z_gram += sum * z[i];
  }
  // |x - U^T z|^2 = x^2 - 2 z U x + z U U^T z, and U x is z but for its rounding.
  const double x = std::sqrt(x_squares), rounding = scan.basis_error * x;
  const double rest = x_squares - 2 * z_squares + z_gram + 2 * rounding * std::sqrt(z_squares);
  Output& out = outputs_[output];
  out.finite = x < 1e18;  // beyond it float32 might overflow on the way
  out.along = static_cast<float>((std::sqrt(z_squares) + rounding) * kUp + 1e-20);
  out.across = static_cast<float>(std::sqrt(std::max(rest, 0.0) + 1e-9 * x_squares) * kUp + 1e-20);
}

void Scan::multiply(size_t unit, float* scratch) {
  head_rows(m_, m_.scan.matrix, operand_, args_.num_outputs, unit, scratch, args_.logits);
}

void Scan::pick(size_t output) noexcept {
  Output& out = outputs_[output];
  if (!out.finite) return;
  const size_t count = std::min<size_t>(m_.vocab, std::max<size_t>(kPicked, args_.needed[output]));
  try {
    std::vector<int32_t> ids(count);
    out.logits.resize(count);
    choose_candidates(*m_.kernels, args_.logits + output * m_.vocab, m_.vocab, count, ids.data(),
                      out.logits.data());
    out.ids.assign(ids.begin(), ids.end());
  } catch (const std::bad_alloc&) {
    out_of_memory_ = true;
    out.ids.clear();
  }
}

void Scan::plan() {
  size_t tiles = 0, rescored = 0;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Output& out = outputs_[i];
    worthwhile_ = worthwhile_ && out.finite;
    rescored += out.ids.size();
    tiles += (out.ids.size() - out.begin + SK_ROW_TILE - 1) / SK_ROW_TILE;
    tile_ends_[i] = tiles;
  }
  worthwhile_ = worthwhile_ && rescored <= most_ && !out_of_memory_;
}

void Scan::rescore(size_t tile, float* scratch) {
  const auto found = std::upper_bound(tile_ends_.begin(), tile_ends_.end(), tile);
  const size_t output = static_cast<size_t>(found - tile_ends_.begin());
  Output& out = outputs_[output];
  const size_t first_tile = output == 0 ? 0 : tile_ends_[output - 1];
  const size_t first = out.begin + (tile - first_tile) * SK_ROW_TILE;
  const size_t count = std::min<size_t>(SK_ROW_TILE, out.ids.size() - first);
  Matrix gathered = m_.lm_head;
  uint8_t* const rows = reinterpret_cast<uint8_t*>(scratch);
  gathered.codes = rows;
  gathered.stride = size_t{gathered.columns} * sizeof(uint16_t);
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(rows + i * gathered.stride,
                m_.lm_head.codes + out.ids[first + i] * m_.lm_head.stride, gathered.stride);
  }
  std::memset(rows + count * gathered.stride, 0, (SK_ROW_TILE - count) * gathered.stride);
  float* const logits = scratch + SK_ROW_TILE * gathered.columns / 2;
  const void* exact = static_cast<const uint8_t*>(exact_) + output * exact_bytes_;
  // A row's bits depend neither on its place nor on the rows beside it.
  gathered.products->dot(&gathered, 0, SK_ROW_TILE, exact, 1, logits, SK_ROW_TILE);
  std::copy_n(logits, count, out.logits.data() + first);
}

void Scan::collect(size_t output) noexcept {
  try {
    collect_within_reach(output);
  } catch (const std::bad_alloc&) {
    out_of_memory_ = true;
    outputs_[output].begin = outputs_[output].ids.size();
  }
}

void Scan::collect_within_reach(size_t output) {
  Output& out = outputs_[output];
  const size_t known = out.ids.size(), needed = args_.needed[output];
  out.begin = known;
  if (known < needed) return;  // not finite, or out of memory
  // As many as are needed have at least this logit, so what cannot reach it is none of the best.
  std::vector<float> ordered = out.logits;
  const auto last = ordered.begin() + static_cast<ptrdiff_t>(needed - 1);
  std::nth_element(ordered.begin(), last, ordered.end(), std::greater<float>());
  const float bound = *last;
  std::vector<uint32_t> skipped = out.ids;
  std::sort(skipped.begin(), skipped.end());
  auto skip = skipped.begin();
  uint32_t places[kBlock];
  const float* logits = args_.logits + output * m_.vocab;
  for (size_t from = 0; from < m_.vocab && out.ids.size() <= most_; from += kBlock) {
    const size_t n = std::min(kBlock, m_.vocab - from);
    const size_t found = m_.kernels->within_reach(logits + from, m_.scan.along.data() + from,
                                                  m_.scan.across.data() + from, n, out.along,
                                                  out.across, bound, places);
    for (size_t i = 0; i < found; ++i) {
      const uint32_t id = static_cast<uint32_t>(from) + places[i];
      while (skip != skipped.end() && *skip < id) ++skip;
      if (skip == skipped.end() || *skip != id) out.ids.push_back(id);
    }
  }
  out.logits.resize(out.ids.size());
}

void Scan::finish(size_t output) noexcept {
  const Output& out = outputs_[output];
  const size_t kept = std::min<size_t>(SK_NUM_CANDIDATES, m_.vocab), needed = args_.needed[output];
  int32_t* ids = args_.candidate_ids + output * kept;
  float* logits = args_.candidate_logits + output * kept;
  try {
    choose_among(out.ids.data(), out.logits.data(), out.ids.size(), needed, ids, logits);
  } catch (const std::bad_alloc&) {
    out_of_memory_ = true;
    return;
  }
  std::fill(ids + needed, ids + kept, -1);
  std::fill(logits + needed, logits + kept, -std::numeric_limits<float>::infinity());
  args_.log_normalizers[output] = std::numeric_limits<float>::quiet_NaN();
  args_.log_normalizers_1[output] = std::numeric_limits<float>::quiet_NaN();
  args_.rescored[output] = static_cast<uint32_t>(out.ids.size());
}

}  // namespace sk
