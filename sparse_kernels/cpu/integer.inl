// Products with integer weights, in terms of Simd and of the level's own Integers.
//
// Inputs of a dot product are integers with a scale for each group of columns, so that the sum of a
// group is exact:
//
//   <row, x> = sum over groups of  scale a (sum of code x) - scale zero a (sum of x)
//
// added up in float32 in the order of the groups. In the down product a neuron's scale goes into
// its activation; 64 activations are then integers with one scale t for all columns, and
//
//   y_c = sum over blocks of 64 neurons of  t (sum of code v) - t (sum of zero v),  v = a scale /
//   t.
//
// Both are the same whatever other tokens and rows are computed beside.
#pragma once

#include "kernels_math.inl"

namespace {
namespace integer {

constexpr size_t kBlock = 64;       // columns, or neurons
constexpr size_t kRowTile = 16;     // rows whose scales are side by side
constexpr size_t kTokenGroup = 16;  // tokens of a down product at once
constexpr size_t kMostGroup = 128;  // columns
// The largest integer of inputs and activations: two signed bytes, or one, hold it.
template <int kBits>
constexpr float kLimit = kBits == 16 ? 32512.0f : 127.0f;

inline float largest_magnitude(const float* x, size_t n) {
  F top = Simd::zero(), others = Simd::zero();
  for (size_t i = 0; i < n; i += kLanes) {
    const F v = Simd::load(x + i);
    top = Simd::max(Simd::abs(v), top);
    others = Simd::fma(v, Simd::zero(), others);  // not a number if one of them is not finite
  }
  return Simd::largest(top) + Simd::sum(others);
}

// What makes integers of numbers up to `top`, and numbers of the integers.
struct Scale {
  float to, from;
};

template <int kBits>
inline Scale scale_for(float top) {
  // Whoever depends on a number that is not finite gets none.
  if (!(top <= 3.4e38f)) return {0.0f, __builtin_nanf("")};
  if (top < 1e-30f) return {0.0f, 0.0f};
  return {kLimit<kBits> / top, top / kLimit<kBits>};
}

// x [n], a multiple of 32, as integers; returns their scale.
template <int kBits>
inline float quantize(const float* x, size_t n, int16_t* out) {
  const Scale scale = scale_for<kBits>(largest_magnitude(x, n));
  if (scale.to == 0.0f) {
    memset(out, 0, n * sizeof(int16_t));
    return scale.from;
  }
  for (size_t i = 0; i < n; i += kLanes) {
    Simd::round_to(Simd::load(x + i) * Simd::set(scale.to), out + i);
  }
  return scale.from;
}

inline float sum_of(const int16_t* x, size_t n) {
  int32_t sum = 0;
  for (size_t i = 0; i < n; ++i) sum += x[i];
  return static_cast<float>(sum);
}

// Columns of an input are multiplied in units, whose other columns are zero: a block of 64, or the
// half of one that a group of 32 is.
struct Units {
  explicit Units(const Matrix& m)
      : count(m.group == 32 ? m.groups : m.columns / kBlock),
        block_shift(m.group == 32 ? 1 : 0),
        group_shift(m.group == 128 ? 1 : 0) {}
  // Of a group: [first(g), last(g)).
  size_t first(size_t group) const { return group << group_shift; }
  size_t last(size_t group) const { return at_most((group + 1) << group_shift, count); }
  // Where its codes are.
  size_t block(size_t unit) const { return unit >> block_shift; }

  size_t count, block_shift, group_shift;
};

// One token's input: unit(index, integers [64]) for each unit, group(index, scale, scale times the
// sum of the integers) for each group.
template <int kBits, typename Unit, typename Group>
inline void quantize_input(const Matrix& m, const float* x, size_t n, Unit&& unit, Group&& group) {
  const Units units(m);
  for (size_t g = 0; g < m.groups; ++g) {
    const size_t begin = g * m.group, width = at_most(m.group, m.columns - begin);
    alignas(64) float padded[kMostGroup];
    const float* from = x + begin;
    if (begin + width > n) {
      for (size_t i = 0; i < width; ++i) padded[i] = begin + i < n ? from[i] : 0.0f;
      from = padded;
    }
    alignas(64) int16_t integers[kMostGroup] = {};
    if (units.block_shift == 1) {
      const size_t half = g % 2 * 32;
      const float scale = quantize<kBits>(from, 32, integers + half);
      unit(g, integers);
      group(g, scale, scale * sum_of(integers, kBlock));
      continue;
    }
    const float scale = quantize<kBits>(from, width, integers);
    for (size_t i = units.first(g); i < units.last(g); ++i) {
      unit(i, integers + (i - units.first(g)) * kBlock);
    }
    group(g, scale, scale * sum_of(integers, width));
  }
}

// Of lanes at `place` in the scales of a matrix: those of its codes, and what is added per column.
inline F load_scales_at(const Matrix& m, size_t place, F* offset) {
  const F scale = Simd::load_half(m.scales + place);
  *offset = scale * (Simd::set(m.middle) - Simd::widen_bytes(m.zeros + place));
  return scale * Simd::set(m.unit);
}

// The scales of 16 rows in groups [first, last), and scale times (middle - zero): [group][16].
inline void load_scales(const Matrix& m, size_t row, size_t first, size_t last, float* scales,
                        float* offsets) {
  const size_t from = (row / kRowTile * m.groups + first) * kRowTile;
  for (size_t i = 0; i < (last - first) * kRowTile; i += kLanes) {
    F offset;
    Simd::store(scales + i, load_scales_at(m, from + i, &offset));
    Simd::store(offsets + i, offset);
  }
}

// The same of some rows of a few blocks, side by side: [group][kChosenStride].
constexpr size_t kChosenStride = kMostChosen + 16;  // room for what compress writes too much

inline void load_chosen_scales(const Matrix& m, const ChosenRows& rows, size_t first, size_t last,
                               float* scales, float* offsets) {
  for (size_t i = 0, done = 0; i < rows.blocks * kBlock; i += kLanes) {
    const BlockMask own = rows.masks[i / kBlock] >> i % kBlock & ((BlockMask{1} << kLanes) - 1);
    if (own == 0) continue;
    const size_t row = rows.first + i;
    for (size_t g = first; g < last; ++g) {
      const size_t place = (row / kRowTile * m.groups + g) * kRowTile + row % kRowTile;
      const size_t to = (g - first) * kChosenStride + done;
      F offset;
      Simd::compress(scales + to, load_scales_at(m, place, &offset), own);
      Simd::compress(offsets + to, offset, own);
    }
    done += static_cast<size_t>(__builtin_popcountll(own));
  }
}

// Activations divided by t, [neurons / 64][tokens][64], then t [neurons / 64][tokens].
size_t activation_bytes(size_t tokens, size_t neurons) {
  return tokens * (neurons + neurons / kBlock) * sizeof(float);
}

template <int kBits>
void swiglu(const SwigluTask* task) {
  const Matrix& m = *task->down;
  // No group of a neuron has a larger scale.
  alignas(64) float most[kBlock];
  for (size_t i = 0; i < kBlock; i += kLanes) {
    const size_t row = task->first + i;
    const uint16_t* scales = m.scales + row / kRowTile * m.groups * kRowTile + row % kRowTile;
    F top = Simd::zero();
    for (size_t g = 0; g < m.groups; ++g)
      top = Simd::max(Simd::load_half(scales + g * kRowTile), top);
    Simd::store(most + i, top);
  }
  float* activations = static_cast<float*>(task->activations);
  float* factors = activations + task->tokens * task->neurons;
  for (size_t token = 0; token < task->tokens; ++token) {
    alignas(64) float values[kBlock], scaled[kBlock];
    swiglu_row(*task, token, values);
    for (size_t i = 0; i < kBlock; i += kLanes) {
      Simd::store(scaled + i, Simd::load(values + i) * Simd::load(most + i));
    }
    const Scale scale = scale_for<kBits>(largest_magnitude(scaled, kBlock));
    float* out = activations + (task->first * task->tokens + token * kBlock);
    for (size_t i = 0; i < kBlock; i += kLanes) {
      // Without a scale they would not be zero where they are not finite.
      const F v = scale.to == 0.0f ? Simd::zero() : Simd::load(values + i) * Simd::set(scale.to);
      Simd::store(out + i, v);
    }
    factors[task->first / kBlock * task->tokens + token] = scale.from;
  }
}

constexpr size_t kWideStrip = 1024;  // columns of a few tokens
constexpr size_t kStrip = 128;       // of many
constexpr size_t kMostStripGroups = kWideStrip / 32;

// A down product of some tokens and columns, and what it needs.
struct DownStrip {
  size_t token, tokens;                              // at most kTokenGroup
  size_t column, columns;                            // at most kWideStrip
  size_t groups;                                     // of columns
  alignas(64) float sums[kTokenGroup * kWideStrip];  // [token][columns], as Integers orders them
  float offsets[kTokenGroup * kMostStripGroups];     // [token][groups]
};

// Some neurons of a block, and the matrix that has their codes; of each token those that count,
// null: all.
struct BlockPart {
  const Matrix* weights;
  BlockMask used;
  const BlockMask* own;  // [tokens of the task]
  bool others;           // those that are not `own` count
  BlockMask of(size_t token) const {
    if (own == nullptr) return kWholeBlock;
    return others ? ~own[token] : own[token];
  }
};

// The activations of a part of a block for a group of columns, side by side; their part of the
// offsets is added.
template <int kBits>
inline void quantize_activations(const DownTask& task, size_t neuron, const BlockPart& part,
                                 size_t group, size_t strip_group, DownStrip* strip,
                                 const float* factors, typename Integers::Activations* out) {
  constexpr size_t kVectors = kBlock / kLanes;
  const Matrix& m = *task.weights;
  const size_t tile = m.groups * kRowTile;
  const size_t place = neuron / kRowTile * tile + group * kRowTile;
  F scales[kVectors];
  for (size_t i = 0; i < kVectors; ++i) {
    const size_t row = i * kLanes;
    scales[i] = Simd::load_half(m.scales + place + row / kRowTile * tile + row % kRowTile);
  }
  for (size_t t = 0; t < strip->tokens; ++t) {
    const float* from = static_cast<const float*>(task.activations) + neuron * task.tokens +
                        (strip->token + t) * kBlock;
    const BlockMask own = part.of(strip->token + t);
    F values[kVectors];
    for (size_t i = 0; i < kVectors; ++i) {
      values[i] = Simd::keep_bits(Simd::load(from + i * kLanes), own >> i * kLanes) * scales[i];
    }
    // Exact, as the sums of the codes are: who else is in the block makes no difference.
    const int32_t offset =
        out->template put<kBits>(t, strip->tokens, values, part.used, m.zeros + place, tile);
    strip->offsets[t * strip->groups + strip_group] += static_cast<float>(offset) * factors[t];
  }
}

// A part of block `neuron`, whose codes are in `codes`, is added to the sums of a strip.
template <int kBits>
inline void add_block(const DownTask& task, size_t neuron, const BlockPart& part,
                      const uint8_t* codes, DownStrip* strip) {
  const Matrix& m = *task.weights;
  const float* factors = static_cast<const float*>(task.activations) + task.tokens * task.neurons +
                         neuron / kBlock * task.tokens + strip->token;
  const size_t neurons = static_cast<size_t>(__builtin_popcountll(part.used));
  Integers::Activations activations;
  for (size_t begin = 0; begin < strip->columns; begin += m.group) {
    const size_t group = (strip->column + begin) / m.group;
    quantize_activations<kBits>(task, neuron, part, group, begin / m.group, strip, factors,
                                &activations);
    Integers::add_columns<kBits>(codes, strip->columns, begin,
                                 at_most(m.group, strip->columns - begin), neurons, activations,
                                 strip->tokens, factors, strip->sums);
  }
}

inline void finish_strip(const DownTask& task, DownStrip* strip) {
  const size_t group = task.weights->group;
  for (size_t t = 0; t < strip->tokens; ++t) {
    float* out =
        task.out + (strip->token + t) * task.out_stride + strip->column - task.first_column;
    F offset = Simd::zero();
    for (size_t begin = 0; begin < strip->columns; begin += kBlock) {
      alignas(64) float sums[kBlock];
      Integers::in_order(strip->sums + t * strip->columns + begin, sums);
      for (size_t i = 0; i < kBlock; i += kLanes) {
        if ((begin + i) % group == 0) {
          const size_t g = (begin + i) / group;
          offset = Simd::set(strip->offsets[t * strip->groups + g]);
        }
        F v = Simd::load(sums + i) - offset;
        if (task.add) v = Simd::load(out + begin + i) + v;
        Simd::store(out + begin + i, v);
      }
    }
  }
}

// What of a block is read: nothing, one matrix's rows, or two's.
inline size_t parts_of(const DownTask& task, size_t neuron, BlockPart* parts) {
  if (task.used == nullptr) return 1;
  const size_t block = (neuron - task.first_neuron) / kBlock;
  if (task.coarse == nullptr) {
    parts[0].used = task.used[block];
    return parts[0].used != 0;
  }
  const BlockMask* own = task.by_coarse + block * task.tokens;
  BlockMask coarse = 0;
  for (size_t t = 0; t < task.tokens; ++t) coarse |= own[t];
  size_t count = 0;
  const BlockMask whole = task.used[block];
  if (whole != 0) parts[count++] = {task.weights, whole, own, true};
  if (coarse != 0) parts[count++] = {task.coarse, coarse, own, false};
  return count;
}

// In how many fours the neurons that are used are read.
inline size_t task_fours(const DownTask& task) {
  size_t fours = 0;
  for (size_t n = task.first_neuron; n < task.last_neuron; n += kBlock) {
    const BlockMask used = task.used[(n - task.first_neuron) / kBlock];
    fours += (static_cast<size_t>(__builtin_popcountll(used)) + 3) / 4;
  }
  return fours == 0 ? 1 : fours;
}

template <int kBits>
void down(const DownTask* task) {
  // Weights in the order of Integers. Few tokens: a block at a time, its rows in long pieces as
  // memory likes it; many: all blocks of a narrow strip, for all tokens.
  alignas(64) uint8_t codes[kMaxDownNeurons * kStrip];
  static_assert(kMaxDownNeurons * kStrip >= kBlock * kWideStrip, "room for one block");
  DownStrip strip;
  const bool few = task->tokens <= kTokenGroup;
  if (task->fetch != nullptr) begin_fetch(task->fetch, task_fours(*task));
  const size_t end = task->first_column + task->columns, most = few ? kWideStrip : kStrip;
  for (strip.column = task->first_column; strip.column < end; strip.column += most) {
    strip.columns = at_most(most, end - strip.column);
    strip.groups = (strip.columns + task->weights->group - 1) / task->weights->group;
    const size_t block_bytes = few ? 0 : kBlock * strip.columns;
    const auto gather = [&](size_t neuron, const BlockPart& part) {
      const size_t block = (neuron - task->first_neuron) / kBlock;
      uint8_t* to = codes + block * block_bytes;
      if (part.used == kWholeBlock) {
        const size_t row = task->places == nullptr ? neuron : task->places[block];
        Integers::gather(*part.weights, row, strip.column, strip.columns, to);
      } else {
        Neurons rows;
        add_rows_of(*task, block, part.used, &rows);
        Integers::gather_chosen(*part.weights, rows, strip.column, strip.columns, to, task->fetch);
      }
    };
    const BlockPart all = {task->weights, kWholeBlock, nullptr, false};
    if (!few) {
      for (size_t n = task->first_neuron; n < task->last_neuron; n += kBlock) gather(n, all);
    }
    for (strip.token = 0; strip.token < task->tokens; strip.token += kTokenGroup) {
      strip.tokens = at_most(kTokenGroup, task->tokens - strip.token);
      memset(strip.sums, 0, strip.tokens * strip.columns * sizeof(float));
      memset(strip.offsets, 0, strip.tokens * strip.groups * sizeof(float));
      for (size_t n = task->first_neuron; n < task->last_neuron; n += kBlock) {
        const uint8_t* own = codes + (n - task->first_neuron) / kBlock * block_bytes;
        BlockPart parts[2] = {all, all};
        const size_t count = few ? parts_of(*task, n, parts) : 1;
        for (size_t i = 0; i < count; ++i) {
          if (few) gather(n, parts[i]);
          add_block<kBits>(*task, n, parts[i], own, &strip);
        }
      }
      finish_strip(*task, &strip);
    }
  }
}

}  // namespace integer
}  // namespace
