// The feed-forward layers of a few tokens some of which choose their neurons: a few blocks at a
// time, what each of them uses, and that alone is read. What is read next is fetched meanwhile:
// chosen rows are no order that the CPU would foresee.
#include <type_traits>

#include "forward.hpp"

namespace sk {
namespace {

constexpr size_t kBlock = SK_NEURON_BLOCK;
constexpr size_t kTile = SK_ROW_TILE;

bool none(const ChosenRows& rows) { return rows.count == 0; }
bool all(const ChosenRows& rows) { return rows.count == rows.blocks * kBlock; }

// Makes the list of the rows that are in the masks.
void list(ChosenRows* rows) {
  rows->count = 0;
  for (size_t i = 0; i < rows->blocks; ++i) {
    const uint32_t first = static_cast<uint32_t>(rows->first + i * kBlock);
    for (BlockMask left = rows->masks[i]; left != 0; left &= left - 1) {
      rows->at[rows->count++] = first + static_cast<uint32_t>(__builtin_ctzll(left));
    }
  }
}

// The product with some rows; the same bits whichever way.
void dot_some(const Matrix& matrix, const ChosenRows& rows, const void* operand, size_t tokens,
              float* out, Fetch* fetch) {
  const size_t stride = rows.blocks * kBlock;
  if (none(rows)) return;
  if (all(rows)) {
    matrix.products->dot(&matrix, rows.first, stride, operand, tokens, out, stride);
  } else {
    matrix.products->dot_chosen(&matrix, &rows, operand, tokens, out, stride, fetch);
  }
}

// Adds some rows, but for the first ones, to those that are fetched.
void add_rows(const Matrix& matrix, const ChosenRows& rows, size_t skipped, Fetch* fetch) {
  constexpr size_t kSideBySide = std::extent_v<decltype(Fetch::Rows::at)>;
  const auto add = [&](const uint8_t* data, size_t stride, uint32_t bits) {
    for (size_t i = skipped; i < rows.count; i += kSideBySide) {
      Fetch::Rows& to = fetch->rows[fetch->count++];
      to.bytes = matrix.columns * bits / 8;
      for (size_t j = 0; j < kSideBySide; ++j) {
        to.at[j] = data + rows.at[std::min(i + j, rows.count - 1)] * stride;
      }
    }
  };
  add(matrix.codes, matrix.stride, matrix.bits);
  if (matrix.low != nullptr) add(matrix.low, matrix.low_stride, matrix.low_bits);
}
// Together at most gate, up and down of kChosenBlocks blocks and gate of the next, in two planes.
static_assert(4 * 2 * kChosenBlocks * kBlock / std::extent_v<decltype(Fetch::Rows::at)> <=
                  std::extent_v<decltype(Fetch::rows)>,
              "there is room for what is fetched");

void clear(Fetch* fetch) { fetch->count = fetch->next = fetch->byte = 0; }

// Where blocks that are multiplied together end, of those up to `last`.
size_t piece_end(size_t first, size_t last) {
  const size_t left = last - first, pieces = (left + kChosenBlocks - 1) / kChosenBlocks;
  return first + (left + pieces - 1) / pieces;
}

uint32_t kind_of(const Token& token) {
  const sk_choice* choice = token.sequence->choice;
  return choice == nullptr ? uint32_t{SK_CHOICE_CORE} : choice->kind;
}

// Numbers side by side, of the neurons in a mask -> their places in a block; zero elsewhere.
void spread_block(const float* from, BlockMask mask, float* to) {
  std::fill_n(to, kBlock, 0.0f);
  for (; mask != 0; mask &= mask - 1) to[__builtin_ctzll(mask)] = *from++;
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
  const BlockMask exist = layer.members(block);
  const sk_choice* choice = token.sequence->choice;
  if (choice == nullptr || choice->core == nullptr) return exist;
  return choice->core[index * m_.words + block] & exist;
}

void Forward::add_chosen(const Layer& layer, size_t index, uint32_t unit, const Own& own) {
  const ChosenUnits all(layer, ranges_.size());
  const size_t threads = ranges_.size(), units = all.count() + corrected_;
  // The range of units that this thread goes through, unless it helps another; see phase().
  const size_t begin = units * own.index / threads, end = units * (own.index + 1) / threads;
  const size_t first = all.block(unit), last = all.block(unit + 1);
  for (size_t at = first; at < last; at = piece_end(at, last)) {
    const bool fetched = at == first && unit > begin && unit < end;
    activate_chosen(layer, index, at, piece_end(at, last), fetched, own);
  }
  Fetch fetch;
  clear(&fetch);
  if (unit + 1 < end && last < layer.blocks) {
    add_first_rows(layer, index, last, piece_end(last, all.block(unit + 2)), &fetch);
  }
  for (uint32_t p = all.partition(unit); p < all.partition(unit + 1); ++p) {
    down(layer, layer.partition_begin(p), layer.partition_begin(p + 1), 0, layer.down.columns,
         partial_ + p * count_ * layer.down.columns, false, &fetch);
  }
}

void Forward::add_copied(const Layer& layer, size_t index, uint32_t unit, const Own& own) {
  const CopiedLayer& copy = m_.core_copy.layer(index);
  const ChosenUnits units(layer, ranges_.size());
  const size_t first = units.block(unit), last = units.block(unit + 1), begin = copy.starts[first];
  size_t end = begin;
  for (size_t block = first; block < last; ++block) {
    used_[block] = m_.core_copy.mask(m_, index, block);
    end = copy.starts[block] + static_cast<size_t>(__builtin_popcountll(used_[block]));
  }
  const size_t rows = round_up(end - begin, kTile);
  float *const gate = own.scratch, *const up = gate + count_ * rows;
  if (rows != 0) {
    layer.gate.products->dot(&copy.gate, begin, rows, operand_, count_, gate, rows);
    layer.up.products->dot(&copy.up, begin, rows, operand_, count_, up, rows);
  }
  for (size_t block = first; block < last; ++block) {
    const size_t place = copy.starts[block] - begin;
    activate_copied(layer, index, block, gate + place, up + place, rows, own);
  }
  for (uint32_t p = units.partition(unit); p < units.partition(unit + 1); ++p) {
    down(layer, layer.partition_begin(p), layer.partition_begin(p + 1), 0, layer.down.columns,
         partial_ + p * count_ * layer.down.columns, false, nullptr, &copy);
  }
}

void Forward::activate_copied(const Layer& layer, size_t index, size_t block, const float* gate,
                              const float* up, size_t stride, const Own& own) {
  alignas(64) float spread[2][kMaxChoiceTokens * kBlock];
  BlockMask used[kMaxChoiceTokens];
  BlockReads reads[kMaxChoiceTokens];
  for (size_t t = 0; t < count_; ++t) {
    spread_block(gate + t * stride, used_[block], spread[0] + t * kBlock);
    spread_block(up + t * stride, used_[block], spread[1] + t * kBlock);
    used[t] = core_of(layer, index, block, tokens_[t]);
    reads[t] = {used[t], used[t], used[t], used[t]};
  }
  count_reads(reads, own);
  SwigluTask task = {};
  task.down = &layer.down;
  task.gate = spread[0];
  task.up = spread[1];
  task.stride = kBlock;
  task.tokens = count_;
  task.first = block * kBlock;
  task.neurons = task.plain_stride = size_t{layer.blocks} * kBlock;
  task.used = used;
  task.activations = activations_;
  task.plain = plain_;
  layer.down.products->swiglu(&task);
}

void Forward::add_first_rows(const Layer& layer, size_t index, size_t first, size_t last,
                             Fetch* fetch) const {
  ChosenRows cores, planes;
  for (ChosenRows* rows : {&cores, &planes}) {
    *rows = {};
    rows->first = first * kBlock;
    rows->blocks = last - first;
  }
  for (size_t i = 0; i < cores.blocks; ++i) {
    for (size_t t = 0; t < count_; ++t) {
      const bool by_planes = kind_of(tokens_[t]) == SK_CHOICE_PLANES;
      (by_planes ? planes : cores).masks[i] |= core_of(layer, index, first + i, tokens_[t]);
    }
  }
  list(&cores);
  list(&planes);
  add_rows(layer.gate, cores, 0, fetch);
  if (!none(planes)) add_rows(layer.gate_high, planes, 0, fetch);
}

void Forward::activate_chosen(const Layer& layer, size_t index, size_t first, size_t last,
                              bool fetched, const Own& own) {
  const size_t blocks = last - first, stride = blocks * kBlock, row = first * kBlock;
  BlockReads reads[kChosenBlocks][kMaxChoiceTokens];
  float *const gate = own.scratch, *const up = gate + count_ * stride;
  float* const high = up + count_ * stride;
  ChosenRows planes, gates, ups, later_ups, downs;  // that somebody needs
  for (ChosenRows* rows : {&planes, &gates, &ups, &later_ups, &downs}) {
    std::fill_n(rows->masks, kChosenBlocks, BlockMask{0});
    rows->first = row;
    rows->blocks = blocks;
  }
  const auto each = [&](auto&& body) {
    for (size_t i = 0; i < blocks; ++i) {
      for (size_t t = 0; t < count_; ++t) body(i, t, kind_of(tokens_[t]), reads[i][t]);
    }
  };
  each([&](size_t i, size_t t, uint32_t kind, BlockReads& read) {
    const BlockMask core = core_of(layer, index, first + i, tokens_[t]);
    read = {core, core, core, core};
    (kind == SK_CHOICE_PLANES ? planes : gates).masks[i] |= core;
    if (kind == SK_CHOICE_CORE) ups.masks[i] |= core;
  });
  Fetch fetch;
  clear(&fetch);
  list(&planes);
  if (!none(planes)) {
    float* const high_up = high + count_ * stride;
    if (!all(planes)) {  // all rows are one stream
      if (!fetched) add_rows(layer.gate_high, planes, kTile, &fetch);
      add_rows(layer.up_high, planes, 0, &fetch);
    }
    dot_some(layer.gate_high, planes, operand_, count_, high, &fetch);
    clear(&fetch);
    dot_some(layer.up_high, planes, operand_, count_, high_up, &fetch);
    for (size_t i = 0; i < blocks; ++i) {
      choose_by_planes(layer, index, first + i, high + i * kBlock, stride, reads[i]);
    }
    each([&](size_t i, size_t, uint32_t kind, const BlockReads& read) {
      if (kind != SK_CHOICE_PLANES) return;
      gates.masks[i] |= read.whole;
      ups.masks[i] |= read.whole;
    });
  }
  clear(&fetch);
  list(&gates);
  list(&ups);
  if (!fetched || !none(planes)) add_rows(layer.gate, gates, kTile, &fetch);
  add_rows(layer.up, ups, 0, &fetch);
  dot_some(layer.gate, gates, operand_, count_, gate, &fetch);
  clear(&fetch);
  for (size_t i = 0; i < blocks; ++i) {
    choose_by_gate(layer, index, first + i, gate + i * kBlock, stride, reads[i]);
  }
  each([&](size_t i, size_t, uint32_t kind, const BlockReads& read) {
    if (kind == SK_CHOICE_GATE) later_ups.masks[i] |= read.used & ~ups.masks[i];
    downs.masks[i] |= read.down_whole;
  });
  list(&later_ups);
  list(&downs);
  add_rows(layer.up, later_ups, kTile, &fetch);
  add_rows(layer.down, downs, 0, &fetch);
  if (!none(later_ups)) {
    for (size_t i = 0; i < blocks; ++i) ups.masks[i] |= later_ups.masks[i];
    list(&ups);
  }
  dot_some(layer.up, ups, operand_, count_, up, &fetch);
  each([&](size_t i, size_t t, uint32_t, const BlockReads& read) {
    const size_t at = t * stride + i * kBlock;
    const BlockMask approximate = read.used & ~read.whole;
    take_approximate(high + at, approximate, gate + at);
    take_approximate(high + count_ * stride + at, approximate, up + at);
    coarse_[(first + i) * count_ + t] = read.used & ~read.down_whole;
  });
  SwigluTask task = {};
  task.down = &layer.down;
  task.stride = stride;
  task.tokens = count_;
  task.neurons = task.plain_stride = size_t{layer.blocks} * kBlock;
  task.activations = activations_;
  task.plain = plain_;
  for (size_t i = 0; i < blocks; ++i) {
    BlockMask used[kMaxChoiceTokens];
    for (size_t t = 0; t < count_; ++t) used[t] = reads[i][t].used;
    used_[first + i] = downs.masks[i];
    count_reads(reads[i], own);
    task.gate = gate + i * kBlock;
    task.up = up + i * kBlock;
    task.first = row + i * kBlock;
    task.used = used;
    layer.down.products->swiglu(&task);
  }
}

void Forward::choose_by_planes(const Layer& layer, size_t index, size_t block, const float* high,
                               size_t stride, BlockReads* reads) const {
  for (size_t t = 0; t < count_; ++t) {
    if (kind_of(tokens_[t]) != SK_CHOICE_PLANES) continue;
    alignas(64) float variances[2][kBlock];
    const float* squares = squares_ + t * layer.gate.groups;
    k_.variance(&layer.gate_high, block * kBlock, squares, variances[0]);
    k_.variance(&layer.up_high, block * kBlock, squares, variances[1]);
    const ChooseTask task = {high + t * stride,
                             high + (count_ + t) * stride,
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
                             size_t stride, BlockReads* reads) const {
  for (size_t t = 0; t < count_; ++t) {
    if (kind_of(tokens_[t]) != SK_CHOICE_GATE) continue;
    const ChooseTask task = {
        gate + t * stride, nullptr, layer.gate_factors.data() + block * kBlock,
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
  const size_t stride = m_.layers[index].down.columns;
  std::fill_n(out, count_ * stride, 0.0f);
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
        k_.add_rows(&correction.outputs, scratch + t * rows, correction.rank, out + t * stride);
      }
    }
  }
}

}  // namespace sk
