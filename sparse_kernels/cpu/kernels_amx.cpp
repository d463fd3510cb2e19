// Matrix products on the BF16 tiles of AMX. An input is cut into two bfloat16 halves, high and low,
// which together have 16 bits of mantissa; both go through the same tile, as do 8 tokens:
//
//   dot:   C [16 rows, 8 high | 8 low] += W [16 rows, 32] * X [32, 8 high | 8 low]
//   down:  C [8 high | 8 low, 16 columns] += A [8 high | 8 low, 32 neurons] * W [32, 16 columns]
//
// A tile adds up the even and the odd places of 32 and then both; what it does for one token does
// not depend on the others.
// clang-format off: the order matters
#include "simd_avx512.hpp"
#include "kernels_common.inl"
#include "tiles_amx.inl"
#include "attention.inl"
#include "attention_bfloat16.inl"
#include "attention_int8.inl"
// clang-format on

namespace {

constexpr size_t kGroup = 8;   // tokens in a tile
constexpr size_t kTileK = 32;  // inputs in a tile
constexpr size_t kTile = 512;  // bfloat16 numbers, 1 KiB
constexpr size_t kTileFloats = 256;

void begin_thread() { _tile_loadconfig(&kTileConfig); }

// A thread with empty tiles costs the system less to switch away from.
void end_thread() { _tile_release(); }

inline size_t groups_of(size_t tokens) { return (tokens + kGroup - 1) / kGroup; }

// 16 pairs of bfloat16 from 32 floats, and what is left of the floats.
inline __m512i to_bf16(__m512 low, __m512 high, __m512* low_rest, __m512* high_rest) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  const auto rounded = [&](__m512 x) { return _mm512_and_si512(round_to_bf16(x), mask); };
  const __m512i a = rounded(low), b = rounded(high);
  *low_rest = low - _mm512_castsi512_ps(a);
  *high_rest = high - _mm512_castsi512_ps(b);
  // The upper halves of a, then those of b.
  const __m256i first = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16));
  const __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

inline void split(const float* x, __m512i* high, __m512i* low) {
  __m512 a, b, unused_a, unused_b;
  *high = to_bf16(_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16), &a, &b);
  *low = to_bf16(a, b, &unused_a, &unused_b);
}

// [group][k / 32][16 pairs of inputs][8 high | 8 low][2]
size_t operand_bytes(const Matrix* weights, size_t tokens) {
  return groups_of(tokens) * (weights->columns / kTileK) * kTile * sizeof(uint16_t);
}

void store_operand(const Matrix* weights, const float* x, size_t n, size_t token, size_t,
                   void* operand) {
  const size_t k = weights->columns;
  uint32_t* pairs = static_cast<uint32_t*>(operand) + token / kGroup * (k / kTileK) * (kTile / 2) +
                    token % kGroup;
  for (size_t begin = 0; begin < k; begin += kTileK, pairs += kTile / 2) {
    alignas(64) float padded[kTileK];
    const float* from = tile_inputs(x, begin, n, padded);
    __m512i high, low;
    split(from, &high, &low);
    alignas(64) uint32_t high_pairs[16], low_pairs[16];
    _mm512_store_si512(high_pairs, high);
    _mm512_store_si512(low_pairs, low);
    for (size_t i = 0; i < 16; ++i) {
      pairs[16 * i] = high_pairs[i];
      pairs[16 * i + kGroup] = low_pairs[i];
    }
  }
}

// c [16 rows][8 high | 8 low] -> out[token, row] for `tokens` of the 8.
inline void store_dots(const float* c, size_t tokens, float* out, size_t out_stride) {
  for (size_t half = 0; half < 16; half += 8) {
    __m256 row[8];
    for (size_t i = 0; i < 8; ++i) {
      const float* at = c + (half + i) * 16;
      row[i] = _mm256_load_ps(at) + _mm256_load_ps(at + 8);
    }
    __m256 a[8], b[8];
    for (size_t i = 0; i < 8; i += 2) {
      a[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
      a[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    for (size_t i = 0; i < 8; i += 4) {
      b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
      b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
      b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
      b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
    for (size_t i = 0; i < 4; ++i) {
      const __m256 low = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
      const __m256 high = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
      if (i < tokens) _mm256_storeu_ps(out + i * out_stride + half, low);
      if (i + 4 < tokens) _mm256_storeu_ps(out + (i + 4) * out_stride + half, high);
    }
  }
}

// The sums of a product are in the first tiles.
template <size_t kTiles>
inline void zero_sums() {
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
}

template <size_t kTiles>
inline void store_sums(float (*c)[kTileFloats]) {
  _tile_stored(0, c[0], 64);
  if constexpr (kTiles > 1) _tile_stored(1, c[1], 64);
  if constexpr (kTiles > 2) _tile_stored(2, c[2], 64);
  if constexpr (kTiles > 3) _tile_stored(3, c[3], 64);
}

// Two tiles of rows and two groups of tokens.
void dot_2x2(const uint16_t* w, size_t stride, size_t k, const uint16_t* x, float* out,
             size_t out_stride, size_t tokens) {
  const size_t steps = k / kTileK, bytes = stride * sizeof(uint16_t);
  finish_stores();
  zero_sums<4>();
  for (size_t i = 0; i < steps; ++i) {
    _tile_loadd(4, w + i * kTileK, bytes);
    _tile_loadd(6, x + i * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + (steps + i) * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, w + 16 * stride + i * kTileK, bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float c[4][kTileFloats];
  store_sums<4>(c);
  store_dots(c[0], kGroup, out, out_stride);
  store_dots(c[1], tokens - kGroup, out + kGroup * out_stride, out_stride);
  store_dots(c[2], kGroup, out + 16, out_stride);
  store_dots(c[3], tokens - kGroup, out + kGroup * out_stride + 16, out_stride);
}

// One to four tiles of rows and one group of tokens. A tile's product takes 52 cycles, but another
// one can begin after 16: with four sums at once none waits.
template <size_t kTiles>
void dot_nx1(const uint16_t* w, size_t stride, size_t k, const uint16_t* x, float* out,
             size_t out_stride, size_t tokens) {
  const size_t steps = k / kTileK, bytes = stride * sizeof(uint16_t);
  finish_stores();
  zero_sums<kTiles>();
  for (size_t i = 0; i < steps; ++i) {
    const uint16_t* at = w + i * kTileK;
    _tile_loadd(6, x + i * kTile, 64);
    _tile_loadd(4, at, bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTiles > 1) {
      _tile_loadd(5, at + 16 * stride, bytes);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(7, at + 32 * stride, bytes);
      _tile_dpbf16ps(2, 7, 6);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(4, at + 48 * stride, bytes);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  alignas(64) float c[kTiles][kTileFloats];
  store_sums<kTiles>(c);
  for (size_t i = 0; i < kTiles; ++i) store_dots(c[i], tokens, out + 16 * i, out_stride);
}

constexpr decltype(&dot_nx1<1>) kDots[] = {dot_nx1<1>, dot_nx1<2>, dot_nx1<3>, dot_nx1<4>};

void dot(const Matrix* weights, size_t first_row, size_t rows, const void* operand, size_t tokens,
         float* out, size_t out_stride) {
  const size_t k = weights->columns, stride = weights->stride / sizeof(uint16_t);
  const size_t group_size = k / kTileK * kTile;
  const uint16_t* inputs = static_cast<const uint16_t*>(operand);
  const uint16_t* const w = bf16_row(*weights, first_row);
  size_t row = 0;
  for (; tokens > kGroup && row + 32 <= rows; row += 32) {
    size_t token = 0;
    for (; token + kGroup < tokens; token += 2 * kGroup) {
      dot_2x2(w + row * stride, stride, k, inputs + token / kGroup * group_size,
              out + token * out_stride + row, out_stride, at_most(tokens - token, 2 * kGroup));
    }
    if (token < tokens) {
      dot_nx1<2>(w + row * stride, stride, k, inputs + token / kGroup * group_size,
                 out + token * out_stride + row, out_stride, tokens - token);
    }
  }
  while (row < rows) {
    // Six tiles are three and three, not four and two.
    const size_t left = (rows - row) / 16, parts = (left + 3) / 4,
                 tiles = (left + parts - 1) / parts;
    for (size_t token = 0; token < tokens; token += kGroup) {
      kDots[tiles - 1](w + row * stride, stride, k, inputs + token / kGroup * group_size,
                       out + token * out_stride + row, out_stride, at_most(tokens - token, kGroup));
    }
    row += 16 * tiles;
  }
}

// Chosen rows are copied side by side, as tiles want them: a few steps before they are multiplied,
// for a tile waits for what was stored just before.
constexpr size_t kCopiedSteps = 4, kCopiedAhead = 2;

// Up to kTiles tiles of rows and one group of tokens, or two.
template <size_t kTiles, bool kTwoGroups>
void dot_copied(const Matrix& m, const uint32_t* rows, size_t count, const uint16_t* inputs,
                size_t group_size, size_t tokens, float* out, size_t out_stride, Fetch* fetch) {
  static_assert(kTiles * (kTwoGroups ? 2 : 1) <= 4, "the sums are in four tiles");
  constexpr size_t kRows = 16 * kTiles;
  alignas(64) uint16_t copied[kCopiedSteps][kRows * kTileK];
  const uint16_t* at[kRows];
  for (size_t i = 0; i < kRows; ++i) at[i] = bf16_row(m, rows[at_most(i, count - 1)]);
  const size_t steps = m.columns / kTileK;
  const auto copy = [&](size_t step) {
    uint16_t* to = copied[step % kCopiedSteps];
    for (size_t i = 0; i < kRows; ++i) {
      _mm512_store_si512(to + i * kTileK, _mm512_loadu_si512(at[i] + step * kTileK));
    }
  };
  for (size_t step = 0; step < kCopiedAhead && step < steps; ++step) copy(step);
  zero_sums<4>();
  for (size_t step = 0; step < steps; ++step) {
    if (step + kCopiedAhead < steps) copy(step + kCopiedAhead);
    fetch_some(fetch);
    finish_stores();
    const uint16_t *w = copied[step % kCopiedSteps], *x = inputs + step * kTile;
    _tile_loadd(6, x, 64);
    if constexpr (kTwoGroups) _tile_loadd(7, x + group_size, 64);
    _tile_loadd(4, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoGroups) _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTiles > 1) {
      _tile_loadd(5, w + kTile, 64);
      if constexpr (kTwoGroups) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 5, 6);
      }
    }
    if constexpr (kTiles > 2) {
      _tile_loadd(7, w + 2 * kTile, 64);
      _tile_dpbf16ps(2, 7, 6);
    }
    if constexpr (kTiles > 3) {
      _tile_loadd(4, w + 3 * kTile, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  alignas(64) float c[4][kTileFloats];
  store_sums<4>(c);
  finish_stores();
  for (size_t i = 0; i < kTiles; ++i) {
    const size_t tile = kTwoGroups ? 2 * i : i;
    store_dots(c[tile], at_most(tokens, kGroup), out + 16 * i, out_stride);
    if constexpr (kTwoGroups) {
      store_dots(c[tile + 1], tokens - kGroup, out + kGroup * out_stride + 16 * i, out_stride);
    }
  }
}

constexpr decltype(&dot_copied<1, false>) kCopiedDots[] = {
    dot_copied<1, false>, dot_copied<2, false>, dot_copied<3, false>, dot_copied<4, false>};
constexpr decltype(&dot_copied<1, true>) kCopiedDotsOfTwo[] = {dot_copied<1, true>,
                                                               dot_copied<2, true>};

void dot_chosen(const Matrix* weights, const ChosenRows* chosen, const void* operand, size_t tokens,
                float* out, size_t out_stride, Fetch* fetch) {
  const ChosenRows& rows = *chosen;
  const size_t group_size = weights->columns / kTileK * kTile;
  const uint16_t* inputs = static_cast<const uint16_t*>(operand);
  const bool two = tokens > kGroup;
  const size_t most_tiles = two ? 2 : 4, all = (rows.count + 15) / 16;
  size_t parts = (all + most_tiles - 1) / most_tiles;
  begin_fetch(fetch, parts * (weights->columns / kTileK));
  alignas(64) float values[sk::kMaxChoiceTokens * kMostChosen];
  for (size_t i = 0; i < rows.count; --parts) {
    // Six tiles are three and three, not four and two.
    const size_t left = (rows.count - i + 15) / 16, tiles = (left + parts - 1) / parts;
    (two ? kCopiedDotsOfTwo : kCopiedDots)[tiles - 1](*weights, rows.at + i, rows.count - i, inputs,
                                                      group_size, tokens, values + i, kMostChosen,
                                                      fetch);
    i += 16 * tiles;
  }
  spread(rows, values, kMostChosen, tokens, out, out_stride);
}

// [group][neurons / 32][8 high | 8 low][32]
size_t activation_bytes(size_t tokens, size_t neurons) {
  return groups_of(tokens) * (neurons / 32) * kTile * sizeof(uint16_t);
}

void swiglu(const SwigluTask* task) {
  for (size_t token = 0; token < task->tokens; ++token) {
    alignas(64) float values[64];
    swiglu_row(*task, token, values);
    uint16_t* tile = static_cast<uint16_t*>(task->activations) +
                     (token / kGroup * (task->neurons / 32) + task->first / 32) * kTile +
                     token % kGroup * 32;
    for (size_t i = 0; i < 64; i += 32, tile += kTile) {
      __m512i high, low;
      split(values + i, &high, &low);
      _mm512_store_si512(tile, high);
      _mm512_store_si512(tile + kGroup * 32, low);
    }
  }
}

alignas(64) const uint16_t kZeros[32] = {};

// 32 columns of two neurons side by side: pairs of columns {0-3, 8-11, ...} and of {4-7, 12-15,
// ...}.
inline void pair_up(const uint16_t* first, const uint16_t* second, uint16_t* low, uint16_t* high) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  _mm512_store_si512(low, _mm512_unpacklo_epi16(a, b));
  _mm512_store_si512(high, _mm512_unpackhi_epi16(a, b));
}

// c low, c high [8 high | 8 low, 16]: columns in pair_up's order -> out[token, 32 columns].
inline void store_downs(const float* low, const float* high, size_t tokens, float* out,
                        size_t out_stride, bool add) {
  for (size_t token = 0; token < tokens; ++token) {
    const __m512 a = _mm512_load_ps(low + token * 16) + _mm512_load_ps(low + (token + 8) * 16);
    const __m512 b = _mm512_load_ps(high + token * 16) + _mm512_load_ps(high + (token + 8) * 16);
    put_columns(a, b, add, out + token * out_stride);
  }
}

// Two groups of tokens, 32 columns. w: [blocks] of two tiles.
void down_2x2(const uint16_t* w, size_t blocks, const uint16_t* a, size_t group_stride,
              size_t tokens, float* out, size_t out_stride, bool add) {
  finish_stores();
  zero_sums<4>();
  for (size_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, a + block * kTile, 64);
    _tile_loadd(6, w + 2 * block * kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + (2 * block + 1) * kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + group_stride + block * kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float c[4][kTileFloats];
  store_sums<4>(c);
  store_downs(c[0], c[1], kGroup, out, out_stride, add);
  store_downs(c[2], c[3], tokens - kGroup, out + kGroup * out_stride, out_stride, add);
}

// One group of tokens, 32 or 64 columns.
template <bool kWide>
void down_1xn(const uint16_t* w, size_t blocks, const uint16_t* a, size_t tokens, float* out,
              size_t out_stride, bool add) {
  const uint16_t* next = w + 2 * blocks * kTile;
  finish_stores();
  zero_sums<kWide ? 4 : 2>();
  for (size_t block = 0; block < blocks; ++block) {
    _tile_loadd(4, a + block * kTile, 64);
    _tile_loadd(5, w + 2 * block * kTile, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, w + (2 * block + 1) * kTile, 64);
    _tile_dpbf16ps(1, 4, 6);
    if constexpr (kWide) {
      _tile_loadd(7, next + 2 * block * kTile, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, next + (2 * block + 1) * kTile, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  constexpr size_t kTiles = kWide ? 4 : 2;
  alignas(64) float c[kTiles][kTileFloats];
  store_sums<kTiles>(c);
  store_downs(c[0], c[1], tokens, out, out_stride, add);
  if constexpr (kWide) store_downs(c[2], c[3], tokens, out + 32, out_stride, add);
}

// Columns [0, columns) of weights that are paired up, for all tokens.
void down_tiles(const uint16_t* w, size_t columns, const uint16_t* inputs, size_t group_stride,
                size_t blocks, const DownTask& task, float* out) {
  size_t token = 0;
  for (; token + kGroup < task.tokens; token += 2 * kGroup) {
    for (size_t column = 0; column < columns; column += 32) {
      down_2x2(w + column / 32 * blocks * 2 * kTile, blocks, inputs + token / kGroup * group_stride,
               group_stride, at_most(task.tokens - token, 2 * kGroup),
               out + token * task.out_stride + column, task.out_stride, task.add);
    }
  }
  if (token >= task.tokens) return;
  for (size_t column = 0; column < columns;) {
    const bool wide = column + 64 <= columns;
    (wide ? down_1xn<true>
          : down_1xn<false>)(w + column / 32 * blocks * 2 * kTile, blocks,
                             inputs + token / kGroup * group_stride, task.tokens - token,
                             out + token * task.out_stride + column, task.out_stride, task.add);
    column += wide ? 64 : 32;
  }
}

// Weights that are paired up before they are multiplied: rows are read in long pieces, as memory
// likes it, and the pairs stay in the second-level cache.
constexpr size_t kPairedTiles = 256;

// Of a task's neuron, from its first one on; with places where it is if it is used, else that of
// the next one that is. `mask` is of its block.
inline size_t row_of(const DownTask& task, BlockMask mask, size_t neuron) {
  if (task.places == nullptr) return neuron;
  const BlockMask before = mask & ((BlockMask{1} << neuron % 64) - 1);
  return task.places[neuron / 64] + static_cast<size_t>(__builtin_popcountll(before));
}

void down(const DownTask* task) {
  alignas(64) uint16_t tiles[kPairedTiles * kTile];
  const size_t blocks = (task->last_neuron - task->first_neuron) / 32;
  const size_t group_stride = task->neurons / 32 * kTile;
  const size_t stride = task->weights->stride / sizeof(uint16_t);
  const uint16_t* inputs =
      static_cast<const uint16_t*>(task->activations) + task->first_neuron / 32 * kTile;
  const size_t first_row = task->places == nullptr ? task->first_neuron : 0;
  const uint16_t* from = bf16_row(*task->weights, first_row) + task->first_column;
  const size_t strip = kPairedTiles / (2 * blocks) * 32;
  if (task->fetch != nullptr) begin_fetch(task->fetch, blocks * 16);
  for (size_t begin = 0; begin < task->columns; begin += strip) {
    const size_t end = at_most(begin + strip, task->columns);
    for (size_t pair = 0; pair < blocks * 16; ++pair) {
      uint16_t* low = tiles + pair / 16 * 2 * kTile + pair % 16 * 32;
      if (task->fetch != nullptr) fetch_some(task->fetch);
      const BlockMask mask = task->used == nullptr ? kWholeBlock : task->used[pair / 32];
      const uint64_t used = mask >> pair % 32 * 2 & 3;
      const uint16_t* row = from + row_of(*task, mask, 2 * pair) * stride;
      const uint16_t* next = task->places == nullptr ? row + stride : row + (used & 1) * stride;
      // What is not used keeps its place, for the sums' order, but is not read.
      for (size_t column = begin; column < end; column += 32, low += blocks * 2 * kTile) {
        const uint16_t* first = used & 1 ? row + column : kZeros;
        pair_up(first, used & 2 ? next + column : kZeros, low, low + kTile);
      }
    }
    down_tiles(tiles, end - begin, inputs, group_stride, blocks, *task, task->out + begin);
  }
}

Kernels make_kernels() {
  Kernels kernels = {};
  set_common(&kernels);
  set_attention(&kernels);
  kernels.begin_thread = begin_thread;
  kernels.end_thread = end_thread;
  kernels.bfloat16 = {operand_bytes,    store_operand, dot, dot_chosen,
                      activation_bytes, swiglu,        down};
  kernels.integer16 = sk::integer_amx(false);
  kernels.integer8 = sk::integer_amx(true);
  kernels.prompts = sk::prompt_amx();
  kernels.has_prompts = true;
  return kernels;
}

}  // namespace

const sk::Kernels& sk::kernels_amx() {
  static const Kernels kernels = make_kernels();
  return kernels;
}
