// The feed-forward layers of a few tokens some of which choose their neurons: block by block, what
// each of them uses, and that alone is read.
#include <iterator>

#include "forward.hpp"

namespace sk {
namespace {

constexpr size_t kBlock = SK_NEURON_BLOCK;

// The product with some rows of a block; the same bits whichever way.
void dot_some(const Matrix& matrix, size_t first_row, BlockMask rows, const void* operand,
              size_t tokens, float* out, Fetch* fetch) {
  if (rows == 0) return;
  if (rows == kWholeBlock) {
    matrix.products->dot(&matrix, first_row, kBlock, operand, tokens, out, kBlock);
  } else {
    matrix.products->dot_chosen(&matrix, first_row, rows, operand, tokens, out, kBlock, fetch);
  }
}

void clear(Fetch* fetch) { fetch->count = fetch->next = fetch->byte = 0; }

// Adds some rows of a block to those that are fetched.
void add_rows(const Matrix& matrix, size_t first_row, BlockMask rows, Fetch* fetch) {
  const auto add = [&](const uint8_t* data, size_t stride, uint32_t bits) {
    Fetch::Rows* side_by_side = nullptr;
    for (BlockMask left = rows; left != 0; left &= left - 1) {
      if (side_by_side == nullptr || side_by_side->count == std::size(side_by_side->at)) {
        side_by_side = &fetch->rows[fetch->count++];
        side_by_side->count = 0;
        side_by_side->bytes = matrix.columns * bits / 8;
      }
      const size_t row = first_row + static_cast<size_t>(__builtin_ctzll(left));
      side_by_side->at[side_by_side->count++] = data + row * stride;
    }
  };
  add(matrix.codes, matrix.stride, matrix.bits);
  if (matrix.low != nullptr) add(matrix.low, matrix.low_stride, matrix.low_bits);
}

uint32_t kind_of(const Token& token) {
  const sk_choice* choice = token.sequence->choice;
  return choice == nullptr ? uint32_t{SK_CHOICE_CORE} : choice->kind;
}

// Where `from` has what the upper bits make of a neuron that is used and not read whole.
void take_approximate(const float* from, BlockMask mask, float* to) {
  for (; mask != 0; mask &= mask - 1) {
    const int i = __builtin_ctzll(mask);
    to[i] = from[i];
  }
}

}  // namespace

BlockMask Forward::core_of(const Layer& layer, size_t index, size_t block,
                           const Token& token) const {
  const size_t left = layer.neurons - block * kBlock;
  const BlockMask exist = left >= kBlock ? kWholeBlock : (BlockMask{1} << left) - 1;
  const sk_choice* choice = token.sequence->choice;
  if (choice == nullptr || choice->core == nullptr) return exist;
  return choice->core[index * m_.words + block] & exist;
}

void Forward::activate_chosen(const Layer& layer, size_t index, size_t block, const Own& own) {
  BlockReads reads[kMaxChoiceTokens];
  float *const gate = own.scratch, *const up = gate + count_ * kBlock;
  float* const high = up + count_ * kBlock;
  const size_t row = block * kBlock;
  BlockMask planes = 0, gates = 0, ups = 0;  // rows of gate and up that somebody needs
  for (size_t t = 0; t < count_; ++t) {
    const BlockMask core = core_of(layer, index, block, tokens_[t]);
    reads[t] = {core, core, core, core};
    const uint32_t kind = kind_of(tokens_[t]);
    (kind == SK_CHOICE_PLANES ? planes : gates) |= core;
    if (kind == SK_CHOICE_CORE) ups |= core;
  }
  Fetch fetch;
  clear(&fetch);
  if (planes != 0) {
    float* const high_up = high + count_ * kBlock;
    add_rows(layer.up_high, row, planes, &fetch);
    dot_some(layer.gate_high, row, planes, operand_, count_, high, &fetch);
    clear(&fetch);
    dot_some(layer.up_high, row, planes, operand_, count_, high_up, &fetch);
    choose_by_planes(layer, index, block, high, reads);
    for (size_t t = 0; t < count_; ++t) {
      if (kind_of(tokens_[t]) != SK_CHOICE_PLANES) continue;
      gates |= reads[t].whole;
      ups |= reads[t].whole;
    }
  }
  clear(&fetch);
  BlockMask downs = 0;
  for (size_t t = 0; t < count_; ++t) {
    if (kind_of(tokens_[t]) == SK_CHOICE_PLANES) downs |= reads[t].down_whole;
  }
  add_rows(layer.up, row, ups & downs, &fetch);
  add_rows(layer.down, row, downs, &fetch);
  // A block ahead, what is known before anybody chooses.
  BlockMask next_gates = 0, next_cores = 0;
  for (size_t t = 0; t < count_ && block + 1 < layer.blocks; ++t) {
    const uint32_t kind = kind_of(tokens_[t]);
    const BlockMask core = core_of(layer, index, block + 1, tokens_[t]);
    if (kind != SK_CHOICE_PLANES) next_gates |= core;
    if (kind == SK_CHOICE_CORE) next_cores |= core;
  }
  add_rows(layer.gate, row + kBlock, next_gates, &fetch);
  dot_some(layer.gate, row, gates, operand_, count_, gate, &fetch);
  choose_by_gate(layer, index, block, gate, reads);
  for (size_t t = 0; t < count_; ++t) {
    if (kind_of(tokens_[t]) == SK_CHOICE_GATE) ups |= reads[t].used;
  }
  clear(&fetch);
  add_rows(layer.up, row + kBlock, next_cores, &fetch);
  add_rows(layer.down, row + kBlock, next_cores, &fetch);
  dot_some(layer.up, row, ups, operand_, count_, up, &fetch);
  BlockMask used[kMaxChoiceTokens];
  used_[block] = 0;
  for (size_t t = 0; t < count_; ++t) {
    const size_t at = t * kBlock;
    const BlockMask approximate = reads[t].used & ~reads[t].whole;
    take_approximate(high + at, approximate, gate + at);
    take_approximate(high + count_ * kBlock + at, approximate, up + at);
    used[t] = reads[t].used;
    used_[block] |= reads[t].down_whole;
    coarse_[block * count_ + t] = reads[t].used & ~reads[t].down_whole;
  }
  count_reads(reads, own);
  SwigluTask task = {};
  task.down = &layer.down;
  task.gate = gate;
  task.up = up;
  task.stride = kBlock;
  task.tokens = count_;
  task.first = row;
  task.neurons = task.plain_stride = size_t{layer.blocks} * kBlock;
  task.used = used;
  task.activations = activations_;
  task.plain = plain_;
  layer.down.products->swiglu(&task);
}

void Forward::choose_by_planes(const Layer& layer, size_t index, size_t block, const float* high,
                               BlockReads* reads) const {
  for (size_t t = 0; t < count_; ++t) {
    if (kind_of(tokens_[t]) != SK_CHOICE_PLANES) continue;
    alignas(64) float variances[2][kBlock];
    const float* squares = squares_ + t * layer.gate.groups;
    k_.variance(&layer.gate_high, block * kBlock, squares, variances[0]);
    k_.variance(&layer.up_high, block * kBlock, squares, variances[1]);
    const ChooseTask task = {high + t * kBlock,
                             high + (count_ + t) * kBlock,
                             layer.planes_factors.data() + block * kBlock,
                             variances[0],
                             variances[1],
                             tokens_[t].sequence->choice->thresholds + 3 * index};
    Chosen chosen;
    k_.choose(&task, &chosen);
    reads[t].used &= chosen.used;
    reads[t].whole = reads[t].used & chosen.whole;
    reads[t].down_whole =
        layer.down.low == nullptr ? reads[t].used : reads[t].used & chosen.down_whole;
  }
}

void Forward::choose_by_gate(const Layer& layer, size_t index, size_t block, const float* gate,
                             BlockReads* reads) const {
  for (size_t t = 0; t < count_; ++t) {
    if (kind_of(tokens_[t]) != SK_CHOICE_GATE) continue;
    const ChooseTask task = {
        gate + t * kBlock, nullptr, layer.gate_factors.data() + block * kBlock,
        nullptr,           nullptr, tokens_[t].sequence->choice->thresholds + 3 * index};
    Chosen chosen;
    k_.choose(&task, &chosen);
    reads[t].used &= chosen.used;
    reads[t].whole = reads[t].down_whole = reads[t].used;
  }
}

void Forward::count_reads(const BlockReads* reads, const Own& own) {
  const auto add = [](const BlockReads& from, uint64_t* to) {
    const BlockMask masks[] = {from.looked, from.used, from.whole, from.down_whole};
    for (size_t i = 0; i < kReadKinds; ++i) {
      to[i] += static_cast<uint64_t>(__builtin_popcountll(masks[i]));
    }
  };
  uint64_t* const counts = reads_.data() + own.index * reads_stride();
  BlockReads all = {};
  for (size_t t = 0; t < count_; ++t) {
    add(reads[t], counts + tokens_[t].place * kReadKinds);
    all.looked |= reads[t].looked;
    all.used |= reads[t].used;
    all.whole |= reads[t].whole;
    all.down_whole |= reads[t].down_whole;
  }
  add(all, counts + args_.num_sequences * kReadKinds);
}

void Forward::tell_reads(size_t index) {
  const auto hand_on = [&](size_t place, uint64_t* to) {
    for (size_t thread = 0; thread < ranges_.size(); ++thread) {
      uint64_t* from = reads_.data() + thread * reads_stride() + place * kReadKinds;
      for (size_t i = 0; i < kReadKinds; ++i) {
        if (to != nullptr) to[index * kReadKinds + i] += from[i];
        from[i] = 0;
      }
    }
  };
  for (uint32_t s = 0; s < args_.num_sequences; ++s) hand_on(s, args_.sequences[s].reads);
  hand_on(args_.num_sequences, args_.union_reads);
}

void Forward::correct(size_t index, float* scratch, float* out) {
  std::fill_n(out, count_ * m_.columns, 0.0f);
  for (size_t number = 1; number <= m_.corrections.size() / m_.layers.size(); ++number) {
    const auto wants = [&](size_t t) {
      const sk_choice* choice = tokens_[t].sequence->choice;
      return choice != nullptr && choice->correction == number;
    };
    bool wanted = false;
    for (size_t t = 0; t < count_; ++t) wanted = wanted || wants(t);
    const Correction& correction = m_.corrections[(number - 1) * m_.layers.size() + index];
    if (!wanted || correction.rank == 0) continue;
    const size_t rows = round_up(correction.rank, SK_ROW_TILE);
    k_.bfloat16.dot(&correction.inputs, 0, rows, correction_operand_, count_, scratch, rows);
    for (size_t t = 0; t < count_; ++t) {
      if (wants(t)) {
        k_.add_rows(&correction.outputs, scratch + t * rows, correction.rank, out + t * m_.columns);
      }
    }
  }
}

}  // namespace sk
