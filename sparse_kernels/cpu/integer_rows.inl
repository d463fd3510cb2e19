// Dot products of integer rows, 16 rows and one token at a time: sums of a group come from
// Integers::sums as 16 integers.
#include "integer.inl"

namespace {
namespace integer {

// An input: units [count][64] as Integers stores them, scales and offsets [groups].
inline size_t input_bytes(const Matrix& m) {
  const size_t bytes = Units(m).count * Integers::kUnitBytes + 2 * m.groups * sizeof(float);
  return (bytes + 63) / 64 * 64;
}

inline size_t operand_bytes(const Matrix* weights, size_t tokens) {
  return tokens * input_bytes(*weights);
}

inline float* input_scales(const Matrix& m, uint8_t* input) {
  return reinterpret_cast<float*>(input + Units(m).count * Integers::kUnitBytes);
}

template <int kBits>
void store_operand(const Matrix* weights, const float* x, size_t n, size_t token, size_t,
                   void* operand) {
  uint8_t* input = static_cast<uint8_t*>(operand) + token * input_bytes(*weights);
  float* scales = input_scales(*weights, input);
  quantize_input<kBits>(
      *weights, x, n,
      [&](size_t unit, const int16_t* integers) {
        Integers::store_unit<kBits>(integers, input + unit * Integers::kUnitBytes);
      },
      [&](size_t group, float scale, float sum) {
        scales[group] = scale;
        scales[weights->groups + group] = sum;
      });
}

constexpr size_t kChunkColumns = 1024;  // whose codes of 16 rows fit the first-level cache
constexpr size_t kMostChunkGroups = kChunkColumns / 32;

// The same columns of the next 16 rows, which are fetched while these are multiplied: 16 rows side
// by side are no order that the CPU would foresee.
struct Ahead {
  Ahead(const Matrix& m, size_t row, size_t column, bool wanted)
      : codes(m.codes + row * m.stride + column * m.bits / 8),
        low(m.low + row * m.low_stride + column * m.low_bits / 8),
        stride(wanted ? m.stride : 0),
        low_stride(wanted && m.low != nullptr ? m.low_stride : 0),
        bits(m.bits),
        low_bits(m.low_bits) {}
  // Always inline: GCC drops calls of a function that does nothing but prefetch.
  __attribute__((always_inline)) inline void prefetch(size_t column) const {
    if (stride != 0) {
      for (size_t i = 0; i < kRowTile; ++i) {
        __builtin_prefetch(codes + i * stride + column * bits / 8, 0, 2);
      }
    }
    if (low_stride != 0) {
      for (size_t i = 0; i < kRowTile; ++i) {
        __builtin_prefetch(low + i * low_stride + column * low_bits / 8, 0, 2);
      }
    }
  }

  const uint8_t *codes, *low;
  size_t stride, low_stride, bits, low_bits;
};

// The same for rows that were chosen.
struct LaterRows {
  __attribute__((always_inline)) inline void prefetch(size_t) const { fetch_some(fetch); }
  Fetch* fetch;
};

// Groups [first, last) of 16 rows, whose codes begin with the first group's; the next group's
// scales are `scale_stride` further.
template <int kBits, typename Rows, typename Later>
inline void dot_tile(const Matrix& m, const Rows& codes, size_t first, size_t last,
                     const float* scales, const float* offsets, size_t scale_stride,
                     const uint8_t* input, bool add, float* out, const Later& ahead) {
  constexpr size_t kVectors = kRowTile / kLanes;
  const Units units(m);
  const float* input_scale = input_scales(m, const_cast<uint8_t*>(input));
  F sums[kVectors];
  for (size_t i = 0; i < kVectors; ++i) sums[i] = add ? Simd::load(out + i * kLanes) : Simd::zero();
  const size_t first_block = units.block(units.first(first));
  for (size_t g = first; g < last; ++g) {
    const size_t unit = units.first(g);
    ahead.prefetch((g - first) * m.group);
    alignas(64) int32_t exact[kRowTile];
    Integers::sums<kBits>(codes, (units.block(unit) - first_block) * kBlock,
                          input + unit * Integers::kUnitBytes, units.last(g) - unit, exact);
    const F scale = Simd::set(input_scale[g]), sum = Simd::set(input_scale[m.groups + g]);
    for (size_t i = 0; i < kVectors; ++i) {
      const size_t at = (g - first) * scale_stride + i * kLanes;
      sums[i] =
          Simd::fma(Simd::load_int32(exact + i * kLanes) * scale, Simd::load(scales + at), sums[i]);
      sums[i] = Simd::fma(sum, Simd::load(offsets + at), sums[i]);
    }
  }
  for (size_t i = 0; i < kVectors; ++i) Simd::store(out + i * kLanes, sums[i]);
}

template <int kBits>
void dot(const Matrix* weights, size_t first_row, size_t rows, const void* operand, size_t tokens,
         float* out, size_t out_stride) {
  const Matrix& m = *weights;
  const size_t bytes = input_bytes(m);
  for (size_t row = first_row; row < first_row + rows; row += kRowTile) {
    for (size_t begin = 0; begin < m.columns; begin += kChunkColumns) {
      const size_t columns = at_most(kChunkColumns, m.columns - begin);
      alignas(64) uint8_t unpacked[kRowTile * kChunkColumns];
      const Codes codes = Integers::unpack(m, row, begin, columns, unpacked);
      alignas(64) float scales[kMostChunkGroups * kRowTile], offsets[kMostChunkGroups * kRowTile];
      const size_t first = begin / m.group, last = (begin + columns + m.group - 1) / m.group;
      load_scales(m, row, first, last, scales, offsets);
      for (size_t token = 0; token < tokens; ++token) {
        dot_tile<kBits>(m, codes, first, last, scales, offsets, kRowTile,
                        static_cast<const uint8_t*>(operand) + token * bytes, begin != 0,
                        out + token * out_stride + row - first_row,
                        Ahead(m, row + kRowTile, begin, token == 0));
      }
    }
  }
}

// Rows of several blocks in a list, so that few groups of 16 hold them.
template <int kBits>
void dot_chosen(const Matrix* weights, const ChosenRows* chosen, const void* operand, size_t tokens,
                float* out, size_t out_stride, Fetch* fetch) {
  const Matrix& m = *weights;
  const ChosenRows& rows = *chosen;
  const size_t bytes = input_bytes(m);
  begin_fetch(fetch, (rows.count + kRowTile - 1) / kRowTile * m.groups * tokens);
  alignas(64) float values[kTokenGroup * kMostChosen];
  for (size_t begin = 0; begin < m.columns; begin += kChunkColumns) {
    const size_t columns = at_most(kChunkColumns, m.columns - begin);
    alignas(64) float scales[kMostChunkGroups * kChosenStride];
    alignas(64) float offsets[kMostChunkGroups * kChosenStride];
    const size_t first = begin / m.group, last = (begin + columns + m.group - 1) / m.group;
    load_chosen_scales(m, rows, first, last, scales, offsets);
    for (size_t i = 0; i < rows.count; i += kRowTile) {
      alignas(64) uint8_t unpacked[kRowTile * kChunkColumns];
      const ChosenCodes codes = Integers::unpack_chosen(
          m, rows.at + i, at_most(kRowTile, rows.count - i), begin, columns, unpacked);
      for (size_t token = 0; token < tokens; ++token) {
        dot_tile<kBits>(m, codes, first, last, scales + i, offsets + i, kChosenStride,
                        static_cast<const uint8_t*>(operand) + token * bytes, begin != 0,
                        values + token * kMostChosen + i, LaterRows{fetch});
      }
    }
  }
  spread(rows, values, kMostChosen, tokens, out, out_stride);
}

template <int kBits>
Products products() {
  return {operand_bytes,    store_operand<kBits>, dot<kBits>, dot_chosen<kBits>,
          activation_bytes, swiglu<kBits>,        down<kBits>};
}

}  // namespace integer
}  // namespace
