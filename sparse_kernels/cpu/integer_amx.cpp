// Products with integer weights on the INT8 tiles of AMX, whose exact sums are those of VNNI:
//
//   dot:   C [16 rows, 16 tokens] += W [16 rows, 64 codes] * X [64, 16 tokens]
//   down:  C [16 tokens, 16 columns] += A [16 tokens, 64 neurons] * W [64, 16 columns]
//
// once with the upper bytes of the inputs and once with the lower; up to 8 tokens' upper and lower
// bytes go through one tile. A single token is multiplied by vectors: its tiles would be as fast,
// and slower where codes are unpacked or chosen.
// clang-format off: the order matters
#include "simd_avx512.hpp"
#include "integer_amx.inl"
#include "integer_rows.inl"
#include "integer_pairs.inl"
#include "tiles_amx.inl"
// clang-format on

namespace {

using integer::kChunkColumns;
using integer::kMostChunkGroups;
using integer::Units;

constexpr size_t kTileBytes = 1024;
constexpr size_t kTileTokens = 3;  // of a down product, from which on tiles are faster
constexpr size_t kHalfGroup = 8;   // tokens whose upper and lower bytes are one tile

// Where the inputs of the tokens [first, first + count) are in an operand, first a multiple of 16.
template <int kBits>
struct Inputs {
  Inputs(const Matrix& m, size_t tokens, size_t first, const void* operand)
      : count(tokens - first < 16 ? tokens - first : 16),
        unit_bytes(kBits == 8 || count <= kHalfGroup ? kTileBytes : 2 * kTileBytes),
        bytes(static_cast<uint8_t*>(const_cast<void*>(operand)) + first / 16 * group_bytes(m)),
        scales(reinterpret_cast<float*>(bytes + Units(m).count * unit_bytes)),
        sums(scales + 16 * m.groups) {}

  // Of 16 tokens.
  static size_t group_bytes(const Matrix& m) {
    return Units(m).count * 2 * kTileBytes + m.groups * 32 * sizeof(float);
  }

  size_t count, unit_bytes;
  uint8_t* bytes;        // [units][unit_bytes]: fours of columns, tokens, 4
  float *scales, *sums;  // [groups][16 tokens]
};

size_t operand_bytes(const Matrix* weights, size_t tokens) {
  return (tokens + 15) / 16 * Inputs<16>::group_bytes(*weights);
}

template <int kBits>
void store_operand(const Matrix* weights, const float* x, size_t n, size_t token, size_t tokens,
                   void* operand) {
  if (tokens == 1) return integer::store_operand<kBits>(weights, x, n, 0, 1, operand);
  const Inputs<kBits> inputs(*weights, tokens, token / 16 * 16, operand);
  const size_t place = token % 16, low_at = inputs.count <= kHalfGroup ? 32 : kTileBytes;
  integer::quantize_input<kBits>(
      *weights, x, n,
      [&](size_t unit, const int16_t* integers) {
        alignas(64) uint8_t upper[64], lower[64];
        if (kBits == 16) {
          split_bytes(integers, upper, lower);
        } else {
          one_byte(integers, upper);
        }
        uint8_t* to = inputs.bytes + unit * inputs.unit_bytes + place * 4;
        for (size_t i = 0; i < 16; ++i, to += 64) {
          memcpy(to, upper + 4 * i, 4);
          if (kBits == 16) memcpy(to + low_at, lower + 4 * i, 4);
        }
      },
      [&](size_t group, float scale, float sum) {
        inputs.scales[group * 16 + place] = scale;
        inputs.sums[group * 16 + place] = sum;
      });
}

// A piece of 16 rows: the codes of groups [first, last), their scales and offsets
// [group][scale_stride].
struct Piece {
  const uint8_t* codes;
  size_t stride;
  size_t first, last, group;  // columns of one
  const float *scales, *offsets;
  size_t scale_stride;
};

// Adds one group's exact sums, [16 rows][16 lanes] in `c`, to those of 16 rows. Tokens are the
// lanes; with 8 the lanes 8 to 15 hold the lower bytes' sums.
template <int kBits, bool kHalf>
inline void add_group(const int32_t (*c)[256], const Piece& piece, size_t g, const float* scale,
                      const float* sum, __m512* rows) {
  const __m512 a = _mm512_loadu_ps(scale), b = _mm512_loadu_ps(sum);
  const float* scales = piece.scales + (g - piece.first) * piece.scale_stride;
  const float* offsets = piece.offsets + (g - piece.first) * piece.scale_stride;
#pragma GCC unroll 16
  for (size_t i = 0; i < 16; ++i) {
    __m512i exact = _mm512_load_si512(c[0] + 16 * i);
    if constexpr (kBits == 16) {
      const __m512i lower =
          kHalf ? _mm512_shuffle_i32x4(exact, exact, 0x0e) : _mm512_load_si512(c[1] + 16 * i);
      exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), lower);
    }
    const __m512 v = _mm512_cvtepi32_ps(exact) * a;
    rows[i] = _mm512_fmadd_ps(v, _mm512_set1_ps(scales[i]), rows[i]);
    rows[i] = _mm512_fmadd_ps(b, _mm512_set1_ps(offsets[i]), rows[i]);
  }
}

// Sums are in the tiles 0 and 1, of upper and of lower bytes, or in 2 and 3. (The intrinsics want
// literals.)
template <bool kOther, bool kLower>
inline void zero_sums() {
  if constexpr (!kOther) _tile_zero(0);
  if constexpr (!kOther && kLower) _tile_zero(1);
  if constexpr (kOther) _tile_zero(2);
  if constexpr (kOther && kLower) _tile_zero(3);
}

// Adds the products of the weights in tile 4 with inputs at `x`.
template <bool kOther, bool kLower>
inline void multiply_codes(const uint8_t* x) {
  _tile_loadd(6, x, 64);
  if constexpr (!kOther) _tile_dpbusd(0, 4, 6);
  if constexpr (kOther) _tile_dpbusd(2, 4, 6);
  if constexpr (kLower) {
    _tile_loadd(7, x + kTileBytes, 64);
    if constexpr (!kOther) _tile_dpbusd(1, 4, 7);
    if constexpr (kOther) _tile_dpbusd(3, 4, 7);
  }
}

template <bool kOther, bool kLower>
inline void store_sums(int32_t (*c)[256]) {
  if constexpr (!kOther) _tile_stored(0, c[0], 64);
  if constexpr (!kOther && kLower) _tile_stored(1, c[1], 64);
  if constexpr (kOther) _tile_stored(2, c[0], 64);
  if constexpr (kOther && kLower) _tile_stored(3, c[1], 64);
  finish_stores();
}

// Exact sums of a group, of 16 rows and up to 16 tokens, in tiles.
template <bool kOther, bool kLower>
inline void multiply_group(const Units& units, const Piece& piece, size_t g, const uint8_t* inputs,
                           size_t unit_bytes) {
  const size_t first_block = units.block(units.first(piece.first));
  zero_sums<kOther, kLower>();
  for (size_t unit = units.first(g); unit < units.last(g); ++unit) {
    _tile_loadd(4, piece.codes + (units.block(unit) - first_block) * 64, piece.stride);
    multiply_codes<kOther, kLower>(inputs + unit * unit_bytes);
  }
}

// out[token * out_stride + row] of 16 rows and up to 16 tokens; with `add`, to what is there.
template <int kBits, bool kHalf, typename Later>
void dot_tokens(const Units& units, const Piece& piece, const Inputs<kBits>& inputs,
                const Later& ahead, bool add, float* out, size_t out_stride) {
  constexpr bool kLower = kBits == 16 && !kHalf;  // in a tile of their own
  alignas(64) int32_t c[2][2][256];
  alignas(64) float transposed[16][16];
  __m512 rows[16];
  for (size_t i = 0; i < 16; ++i) rows[i] = _mm512_setzero_ps();
  if (add) {
    for (size_t t = 0; t < inputs.count; ++t) {
      _mm512_store_ps(transposed[t], _mm512_loadu_ps(out + t * out_stride));
    }
    transpose(transposed, rows);
  }
  finish_stores();
  // While a group is multiplied, the sums of the one before are added. Loads wait for tile stores
  // before them, so these come last.
  const auto add_sums = [&](size_t g, const int32_t (*sums)[256]) {
    add_group<kBits, kHalf>(sums, piece, g, inputs.scales + g * 16, inputs.sums + g * 16, rows);
  };
  const size_t end = piece.last, group = piece.group;
  multiply_group<false, kLower>(units, piece, piece.first, inputs.bytes, inputs.unit_bytes);
  store_sums<false, kLower>(c[0]);
  for (size_t g = piece.first; g < end; g += 2) {
    ahead.prefetch((g - piece.first) * group);
    if (g + 1 < end) ahead.prefetch((g + 1 - piece.first) * group);
    if (g + 1 < end) {
      multiply_group<true, kLower>(units, piece, g + 1, inputs.bytes, inputs.unit_bytes);
    }
    add_sums(g, c[0]);
    if (g + 1 == end) break;
    store_sums<true, kLower>(c[1]);
    if (g + 2 < end) {
      multiply_group<false, kLower>(units, piece, g + 2, inputs.bytes, inputs.unit_bytes);
    }
    add_sums(g + 1, c[1]);
    if (g + 2 < end) store_sums<false, kLower>(c[0]);
  }
  for (size_t i = 0; i < 16; ++i) _mm512_store_ps(transposed[i], rows[i]);
  __m512 tokens[16];
  transpose(transposed, tokens);
  for (size_t t = 0; t < inputs.count; ++t) _mm512_storeu_ps(out + t * out_stride, tokens[t]);
}

template <int kBits, typename Later>
void dot_piece(const Matrix& m, const Piece& piece, const Inputs<kBits>& inputs, const Later& ahead,
               bool add, float* out, size_t out_stride) {
  if (kBits == 16 && inputs.count <= kHalfGroup) {
    dot_tokens<kBits, true>(Units(m), piece, inputs, ahead, add, out, out_stride);
  } else {
    dot_tokens<kBits, false>(Units(m), piece, inputs, ahead, add, out, out_stride);
  }
}

// Row tiles that are multiplied with one group of tokens after the other: the group's inputs stay
// in the first-level cache meanwhile.
constexpr size_t kRowTiles = 4;

// A piece of some rows, kRowTiles tiles at most, for all tokens.
template <int kBits>
void dot_rows(const Matrix& m, size_t row, size_t tiles, size_t begin, const void* operand,
              size_t tokens, float* out, size_t out_stride) {
  const size_t columns = at_most(kChunkColumns, m.columns - begin);
  const size_t first = begin / m.group, last = (begin + columns + m.group - 1) / m.group;
  alignas(64) uint8_t unpacked[kRowTiles][16 * kChunkColumns];
  alignas(64) float scales[kRowTiles][kMostChunkGroups * 16];
  alignas(64) float offsets[kRowTiles][kMostChunkGroups * 16];
  Piece pieces[kRowTiles];
  for (size_t i = 0; i < tiles; ++i) {
    const Codes codes = unpack(m, row + 16 * i, begin, columns, unpacked[i]);
    integer::load_scales(m, row + 16 * i, first, last, scales[i], offsets[i]);
    pieces[i] = {codes.at, codes.stride, first, last, m.group, scales[i], offsets[i], 16};
  }
  for (size_t t = 0; t < tokens; t += 16) {
    const Inputs<kBits> inputs(m, tokens, t, operand);
    for (size_t i = 0; i < tiles; ++i) {
      dot_piece<kBits>(m, pieces[i], inputs,
                       integer::Ahead(m, row + 16 * (tiles + i), begin, t == 0), begin != 0,
                       out + t * out_stride + 16 * i, out_stride);
    }
  }
}

// Rows of several blocks side by side, so that few tiles hold them.
template <int kBits>
void dot_chosen(const Matrix* weights, const ChosenRows* chosen, const void* operand, size_t tokens,
                float* out, size_t out_stride, Fetch* fetch) {
  if (tokens == 1) {
    return integer::dot_chosen_few<kBits>(weights, chosen, operand, 1, out, out_stride, fetch);
  }
  constexpr size_t kStride = integer::kChosenStride;
  const Matrix& m = *weights;
  const ChosenRows& rows = *chosen;
  const Inputs<kBits> inputs(m, tokens, 0, operand);
  begin_fetch(fetch, (rows.count + 15) / 16 * m.groups);
  alignas(64) float values[integer::kTokenGroup * kMostChosen];
  for (size_t begin = 0; begin < m.columns; begin += kChunkColumns) {
    const size_t columns = at_most(kChunkColumns, m.columns - begin);
    alignas(64) float scales[kMostChunkGroups * kStride], offsets[kMostChunkGroups * kStride];
    const size_t first = begin / m.group, last = (begin + columns + m.group - 1) / m.group;
    integer::load_chosen_scales(m, rows, first, last, scales, offsets);
    for (size_t i = 0; i < rows.count; i += 16) {
      alignas(64) uint8_t unpacked[16 * kChunkColumns];
      Integers::copy_chosen(m, rows.at + i, at_most(16, rows.count - i), begin, columns, unpacked);
      const Piece piece = {unpacked, columns,    first,       last,
                           m.group,  scales + i, offsets + i, kStride};
      dot_piece<kBits>(m, piece, inputs, integer::LaterRows{fetch}, begin != 0, values + i,
                       kMostChosen);
    }
  }
  spread(rows, values, kMostChosen, tokens, out, out_stride);
}

template <int kBits>
void dot(const Matrix* weights, size_t first_row, size_t rows, const void* operand, size_t tokens,
         float* out, size_t out_stride) {
  if (tokens == 1)
    return integer::dot_few<kBits>(weights, first_row, rows, operand, 1, out, out_stride);
  for (size_t row = 0; row < rows; row += 16 * kRowTiles) {
    const size_t tiles = at_most(kRowTiles, (rows - row) / 16);
    for (size_t begin = 0; begin < weights->columns; begin += kChunkColumns) {
      dot_rows<kBits>(*weights, first_row + row, tiles, begin, operand, tokens, out + row,
                      out_stride);
    }
  }
}

// Two vectors of columns of 16 tokens: C [16 tokens, 16 columns]; sums[token][columns] += factor *
// exact. Up to 8 tokens' lower bytes are in the rows 8 to 15.
template <int kBits, bool kHalf, bool kOther>
inline void multiply_columns(const uint8_t* codes) {
  constexpr bool kLower = kBits == 16 && !kHalf;
  zero_sums<kOther, kLower>();
  _tile_loadd(6, codes, 64);
  if constexpr (!kOther) _tile_dpbsud(0, 4, 6);
  if constexpr (kOther) _tile_dpbsud(2, 4, 6);
  if constexpr (kLower && !kOther) _tile_dpbsud(1, 5, 6);
  if constexpr (kLower && kOther) _tile_dpbsud(3, 5, 6);
}

template <int kBits, bool kHalf>
inline void add_vector(const int32_t (*c)[256], size_t tokens, const float* factors,
                       __mmask16 lanes, float* sums, size_t stride) {
  for (size_t t = 0; t < tokens; ++t) {
    __m512i exact = _mm512_load_si512(c[0] + 16 * t);
    if constexpr (kBits == 16) {
      const int32_t* lower = kHalf ? c[0] + 128 : c[1];
      exact = _mm512_add_epi32(_mm512_slli_epi32(exact, 8), _mm512_load_si512(lower + 16 * t));
    }
    float* out = sums + t * stride;
    const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(factors[t]),
                                       _mm512_loadu_ps(out));
    _mm512_mask_storeu_ps(out, lanes, sum);
  }
}

template <int kBits, bool kHalf>
void add_columns_by_tiles(const uint8_t* codes, size_t columns, size_t first, size_t n,
                          const ActivationBytes& activations, size_t tokens, const float* factors,
                          float* sums) {
  constexpr bool kLower = kBits == 16 && !kHalf;
  alignas(64) int32_t c[2][2][256];
  const __mmask16 lanes = lanes_of(first, n);
  const size_t begin = first / 64 * 64, vectors = (first + n - begin + 63) / 64 * 4;
  finish_stores();
  _tile_loadd(4, activations.bytes, 64);
  if constexpr (kBits == 16 && !kHalf) _tile_loadd(5, activations.bytes + 1024, 64);
  const uint8_t* w = codes + begin * 64;
  multiply_columns<kBits, kHalf, false>(w);
  store_sums<false, kLower>(c[0]);
  for (size_t i = 0; i < vectors; i += 2) {
    multiply_columns<kBits, kHalf, true>(w + (i + 1) * 1024);
    add_vector<kBits, kHalf>(c[0], tokens, factors, lanes, sums + begin + 16 * i, columns);
    store_sums<true, kLower>(c[1]);
    if (i + 2 < vectors) multiply_columns<kBits, kHalf, false>(w + (i + 2) * 1024);
    add_vector<kBits, kHalf>(c[1], tokens, factors, lanes, sums + begin + 16 * i + 16, columns);
    if (i + 2 < vectors) store_sums<false, kLower>(c[0]);
  }
}

template <int kBits>
void Integers::add_columns(const uint8_t* codes, size_t columns, size_t first, size_t n,
                           size_t neurons, const Activations& activations, size_t tokens,
                           const float* factors, float* sums) {
  if (tokens < kTileTokens) {
    add_columns_by_vectors<kBits>(codes, columns, first, n, neurons, activations, tokens, factors,
                                  sums);
  } else if (kBits == 16 && tokens <= kHalfGroup) {
    add_columns_by_tiles<kBits, true>(codes, columns, first, n, activations, tokens, factors, sums);
  } else {
    add_columns_by_tiles<kBits, false>(codes, columns, first, n, activations, tokens, factors,
                                       sums);
  }
}

template <int kBits>
Products products() {
  return {operand_bytes,       store_operand<kBits>,      dot<kBits>,
          dot_chosen<kBits>,   integer::activation_bytes, integer::swiglu<kBits>,
          integer::down<kBits>};
}

}  // namespace

sk::Products sk::integer_amx(bool bytes) { return bytes ? products<8>() : products<16>(); }
