// Products of prompts with integer weights, which are taken back to numbers and rounded to
// bfloat16, as the inputs are, for the BF16 tiles of AMX: with many tokens the exact sums of groups
// would cost more than the products.
//
//   dot:   C [16 rows, 16 tokens] += W [16 rows, 32] * X [32, 16 tokens]
//   down:  C [16 tokens, 16 columns] += A [16 tokens, 32 neurons] * W [32, 16 columns]
// clang-format off: the order matters
#include "simd_avx512.hpp"
#include "codes_avx512.inl"
#include "tiles_amx.inl"
// clang-format on

namespace {

constexpr size_t kTokens = 16;          // in a tile
constexpr size_t kTileK = 32;           // inputs in a tile
constexpr size_t kTile = 512;           // bfloat16 numbers, 1 KiB
constexpr size_t kPanelColumns = 1024;  // of 32 rows of weights in numbers
constexpr size_t kStripColumns = 256;   // of kMaxDownNeurons neurons

inline size_t groups_of(size_t tokens) { return (tokens + kTokens - 1) / kTokens; }

// 32 numbers in their order.
inline __m512i to_bf16(__m512 low, __m512 high) {
  const auto rounded = [](__m512 x) { return _mm512_srli_epi32(round_to_bf16(x), 16); };
  // The pack takes lanes of both by turns.
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  return _mm512_permutexvar_epi64(order, _mm512_packus_epi32(rounded(low), rounded(high)));
}

// Block `block` of a row in numbers: 64 of them.
struct Row {
  Row(const Matrix& m, size_t row)
      : codes(m.codes + row * m.stride),
        low(m.low + row * m.low_stride),
        scales(m.scales + row / 16 * m.groups * 16 + row % 16),
        zeros(m.zeros + row / 16 * m.groups * 16 + row % 16) {}
  const uint8_t *codes, *low;
  const uint16_t* scales;  // of a group, 16 apart
  const uint8_t* zeros;
};

template <Planes kPlanes>
inline void numbers(const Row& row, size_t group_shift, size_t block, __m512i* first,
                    __m512i* second) {
  const __m512i codes = load_codes<kPlanes>(row.codes, row.low, block);
  const auto half = [&](__m256i bytes, size_t column) {
    const size_t group = column >> group_shift;
    const __m512 scale = _mm512_set1_ps(_cvtsh_ss(row.scales[group * 16]));
    const __m512 offset = _mm512_set1_ps(-_cvtsh_ss(row.scales[group * 16]) *
                                         static_cast<float>(row.zeros[group * 16]));
    const auto quarter = [&](__m128i b) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b)), scale, offset);
    };
    return to_bf16(quarter(_mm256_castsi256_si128(bytes)),
                   quarter(_mm256_extracti128_si256(bytes, 1)));
  };
  *first = half(_mm512_castsi512_si256(codes), block * 64);
  *second = half(_mm512_extracti64x4_epi64(codes, 1), block * 64 + 32);
}

inline size_t shift_of(const Matrix& m) { return m.group == 32 ? 5 : m.group == 64 ? 6 : 7; }

// Columns [begin, begin + columns) of some rows -> [rows][columns].
template <Planes kPlanes>
inline void fill_panel(const Matrix& m, size_t row, size_t rows, size_t begin, size_t columns,
                       uint16_t* out) {
  for (size_t i = row; i < row + rows; ++i) {
    const Row from(m, i);
    for (size_t column = begin; column < begin + columns; column += 64, out += 64) {
      __m512i first, second;
      numbers<kPlanes>(from, shift_of(m), column / 64, &first, &second);
      _mm512_store_si512(out, first);
      _mm512_store_si512(out + 32, second);
    }
  }
}

// Columns [begin, begin + columns) of some neurons, two neurons side by side, in tiles of 16 pairs
// and 16 columns: [columns / 32][neurons / 32][two tiles], which have the columns {0-3, 8-11, ...}
// and {4-7, 12-15, ...} of 32.
template <Planes kPlanes>
inline void fill_strip(const Matrix& m, size_t neuron, size_t neurons, size_t begin, size_t columns,
                       uint16_t* out) {
  const size_t strip = neurons / 32 * 2 * kTile;
  for (size_t i = 0; i < neurons; i += 2) {
    const Row a(m, neuron + i), b(m, neuron + i + 1);
    uint16_t* to = out + i / 32 * 2 * kTile + i % 32 / 2 * 32;
    for (size_t column = begin; column < begin + columns; column += 64, to += 2 * strip) {
      __m512i a_first, a_second, b_first, b_second;
      numbers<kPlanes>(a, shift_of(m), column / 64, &a_first, &a_second);
      numbers<kPlanes>(b, shift_of(m), column / 64, &b_first, &b_second);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(a_first, b_first));
      _mm512_store_si512(to + kTile, _mm512_unpackhi_epi16(a_first, b_first));
      _mm512_store_si512(to + strip, _mm512_unpacklo_epi16(a_second, b_second));
      _mm512_store_si512(to + strip + kTile, _mm512_unpackhi_epi16(a_second, b_second));
    }
  }
}

// [group][k / 32][16 pairs of inputs][16 tokens][2]
size_t operand_bytes(const Matrix* weights, size_t tokens) {
  return groups_of(tokens) * (weights->columns / kTileK) * kTile * sizeof(uint16_t);
}

void store_operand(const Matrix* weights, const float* x, size_t n, size_t token, size_t,
                   void* operand) {
  const size_t k = weights->columns;
  uint32_t* pairs = static_cast<uint32_t*>(operand) + token / kTokens * (k / kTileK) * (kTile / 2) +
                    token % kTokens;
  for (size_t begin = 0; begin < k; begin += kTileK, pairs += kTile / 2) {
    alignas(64) float padded[kTileK];
    const float* from = tile_inputs(x, begin, n, padded);
    alignas(64) uint32_t rounded[16];
    _mm512_store_si512(rounded, to_bf16(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16)));
    for (size_t i = 0; i < 16; ++i) pairs[16 * i] = rounded[i];
  }
}

// Two by two tiles: C0 = A0 B0, C1 = A0 B1, C2 = A1 B0, C3 = A1 B1, over `steps` of inputs. Those
// of A have rows `stride` bytes apart, those of B are whole tiles.
inline void multiply(const uint16_t* a0, const uint16_t* a1, size_t stride, size_t a_step,
                     const uint16_t* b0, const uint16_t* b1, size_t b_step, size_t steps,
                     float (*c)[256]) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a0 + i * a_step, stride);
    _tile_loadd(6, b0 + i * b_step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + i * b_step, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + i * a_step, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c[0], 64);
  _tile_stored(1, c[1], 64);
  _tile_stored(2, c[2], 64);
  _tile_stored(3, c[3], 64);
  finish_stores();
}

// c [16 rows][16 tokens] -> out[token, row].
inline void put_dots(const float* c, size_t tokens, bool add, float* out, size_t out_stride) {
  __m512 columns[16];
  transpose(reinterpret_cast<const float (*)[16]>(c), columns);
  for (size_t t = 0; t < tokens; ++t) {
    float* to = out + t * out_stride;
    _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + columns[t] : columns[t]);
  }
}

void dot(const Matrix* weights, size_t first_row, size_t rows, const void* operand, size_t tokens,
         float* out, size_t out_stride) {
  alignas(64) uint16_t panel[32 * kPanelColumns];
  alignas(64) float c[4][256];
  const size_t k = weights->columns, group_size = k / kTileK * kTile, groups = groups_of(tokens);
  const uint16_t* inputs = static_cast<const uint16_t*>(operand);
  for (size_t row = 0; row < rows; row += 32) {
    // A tile that there is not is another once more.
    const size_t count = at_most(32, rows - row), other = count == 32 ? 16 : 0;
    for (size_t begin = 0; begin < k; begin += kPanelColumns) {
      const size_t columns = at_most(kPanelColumns, k - begin);
      with_planes(*weights, [&](auto planes) {
        fill_panel<decltype(planes)::value>(*weights, first_row + row, count, begin, columns,
                                            panel);
      });
      if (begin == 0) prefetch_rows(*weights, first_row + row + count, 32);
      for (size_t group = 0; group < groups; group += 2) {
        const size_t next = group + 1 < groups ? 1 : 0;
        const uint16_t* x = inputs + group * group_size + begin / kTileK * kTile;
        multiply(panel, panel + other * columns, columns * sizeof(uint16_t), kTileK, x,
                 x + next * group_size, kTile, columns / kTileK, c);
        for (size_t i = 0; i < 4; ++i) {
          const size_t token = (group + i % 2) * kTokens;
          if ((i % 2 == 1 && next == 0) || (i / 2 == 1 && other == 0)) continue;
          put_dots(c[i], at_most(kTokens, tokens - token), begin != 0,
                   out + token * out_stride + row + i / 2 * 16, out_stride);
        }
      }
    }
  }
}

// [group][neurons / 32][16 tokens][32]
size_t activation_bytes(size_t tokens, size_t neurons) {
  return groups_of(tokens) * (neurons / 32) * kTile * sizeof(uint16_t);
}

void swiglu(const SwigluTask* task) {
  for (size_t token = 0; token < task->tokens; ++token) {
    alignas(64) float values[64];
    swiglu_row(*task, token, values);
    uint16_t* tile = static_cast<uint16_t*>(task->activations) +
                     (token / kTokens * (task->neurons / 32) + task->first / 32) * kTile +
                     token % kTokens * 32;
    for (size_t i = 0; i < 64; i += 32, tile += kTile) {
      _mm512_store_si512(tile,
                         to_bf16(_mm512_load_ps(values + i), _mm512_load_ps(values + i + 16)));
    }
  }
}

// low, high [16 tokens, 16]: columns in the order of fill_strip -> out[token, 32 columns].
inline void put_downs(const float* low, const float* high, size_t tokens, bool add, float* out,
                      size_t out_stride) {
  for (size_t t = 0; t < tokens; ++t) {
    put_columns(_mm512_load_ps(low + t * 16), _mm512_load_ps(high + t * 16), add,
                out + t * out_stride);
  }
}

void down(const DownTask* task) {
  alignas(64) uint16_t strip[sk::kMaxDownNeurons * kStripColumns];
  alignas(64) float c[4][256];
  const size_t neurons = task->last_neuron - task->first_neuron, steps = neurons / 32;
  const size_t group_size = task->neurons / 32 * kTile, groups = groups_of(task->tokens);
  const uint16_t* inputs =
      static_cast<const uint16_t*>(task->activations) + task->first_neuron / 32 * kTile;
  for (size_t begin = 0; begin < task->columns; begin += kStripColumns) {
    const size_t columns = at_most(kStripColumns, task->columns - begin);
    with_planes(*task->weights, [&](auto planes) {
      fill_strip<decltype(planes)::value>(*task->weights, task->first_neuron, neurons,
                                          task->first_column + begin, columns, strip);
    });
    for (size_t group = 0; group < groups; group += 2) {
      const size_t next = group + 1 < groups ? 1 : 0, token = group * kTokens;
      const uint16_t* a = inputs + group * group_size;
      for (size_t column = 0; column < columns; column += 32) {
        const uint16_t* w = strip + column / 32 * steps * 2 * kTile;
        multiply(a, a + next * group_size, 64, kTile, w, w + kTile, 2 * kTile, steps, c);
        float* out = task->out + token * task->out_stride + begin + column;
        put_downs(c[0], c[1], at_most(kTokens, task->tokens - token), task->add, out,
                  task->out_stride);
        if (next == 0) continue;
        put_downs(c[2], c[3], at_most(kTokens, task->tokens - token - kTokens), task->add,
                  out + kTokens * task->out_stride, task->out_stride);
      }
    }
  }
}

}  // namespace

sk::Products sk::prompt_amx() {
  return {operand_bytes, store_operand, dot, nullptr, activation_bytes, swiglu, down};
}
