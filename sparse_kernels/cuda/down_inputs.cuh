// What goes into a down product of integers: the used neurons of a block side by side, their codes,
// and their activations as integers.
#pragma once

#include "product.cuh"

namespace sk {
namespace cuda {

constexpr uint32_t kNobody = 0xff;  // in a list of neurons
// Kinds of masks.
constexpr uint32_t kUsed = 1, kDownWhole = 3;

// 64 neurons, a bit each, the first 32 in x.
__device__ inline uint2 mask_of(const DownArgs& args, uint32_t kind, uint32_t row, uint32_t block) {
  const uint64_t words = args.stride / 16, at = (uint64_t{kind} * (args.rows + 1) + row) * words;
  return read_shared(reinterpret_cast<const uint2*>(args.masks + at + 4 * block));
}
__device__ inline bool has_bit(const uint2& mask, uint32_t neuron) {
  return ((neuron < 32 ? mask.x : mask.y) >> neuron % 32 & 1) != 0;
}
// What a row uses and does not read whole.
__device__ inline uint2 coarse_mask(const DownArgs& args, uint32_t row, uint32_t block) {
  const uint2 used = mask_of(args, kUsed, row, block);
  const uint2 whole = mask_of(args, kDownWhole, row, block);
  return {used.x & ~whole.x, used.y & ~whole.y};
}

// Some neurons of a block, which are read whole or coarsely. Where `split`, each token's other
// neurons do not count.
struct Part {
  uint32_t block;
  uint2 mask;
  bool whole, split;
};

// The neurons of a mask side by side, at most 64, as instructions have them: byte i of word r of
// step s is lane (g, t)'s neuron number 32 s + 16 r + 4 t + i.
struct Places {
  uint32_t words[2][2];
  uint32_t own[2];  // number 2 lane and 2 lane + 1
  uint32_t steps;

  __device__ uint32_t neuron(int step, int r, int i) const {
    return words[step][r] >> (8 * i) & 0xff;
  }
};

__device__ inline Places places_of(const uint2& mask) {
  __shared__ uint32_t lists[kWarps][16];
  uint32_t* const list = lists[warp_index()];
  const uint32_t lane = lane_index(), t = lane % 4, before = (1u << lane) - 1;
  const uint32_t first = count_bits(mask.x), count = first + count_bits(mask.y);
  sync_warp();
  if (lane < 16) list[lane] = ~0u;
  sync_warp();
  uint8_t* const at = reinterpret_cast<uint8_t*>(list);
  if ((mask.x >> lane & 1) != 0) at[count_bits(mask.x & before)] = static_cast<uint8_t>(lane);
  if ((mask.y >> lane & 1) != 0) {
    at[first + count_bits(mask.y & before)] = static_cast<uint8_t>(32 + lane);
  }
  sync_warp();
  return {{{list[t], list[4 + t]}, {list[8 + t], list[12 + t]}},
          {at[2 * lane], at[2 * lane + 1]},
          (count + 31) / 32};
}

// Four words of four bytes, the other way round.
__device__ inline void transpose(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t a = byte_perm(in[0], in[1], 0x5140), b = byte_perm(in[2], in[3], 0x5140);
  const uint32_t c = byte_perm(in[0], in[1], 0x7362), d = byte_perm(in[2], in[3], 0x7362);
  out[0] = byte_perm(a, b, 0x5410);
  out[1] = byte_perm(a, b, 0x7632);
  out[2] = byte_perm(c, d, 0x5410);
  out[3] = byte_perm(c, d, 0x7632);
}

// The codes of a part for a lane's columns, 4 g … 4 g + 3 of each half of the tile: columns 2 j and
// 2 j + 1 of these are rows g and g + 8 of instruction j.
struct PartCodes {
  uint32_t a[2][2][2][4];  // [step][half][j]
};

template <class Format>
__device__ inline void read_codes(const Weights& w, const Part& part, const Places& places,
                                  PartCodes* out) {
  using Tile = typename Format::template Tile<1>;
  // How many steps' bytes there are registers for.
  constexpr int kAtOnce = sizeof(Tile) <= 8 ? 2 : 1;
  const uint32_t quad = lane_index() / 4;
#pragma unroll
  for (int first = 0; first < 2; first += kAtOnce) {
    Tile tiles[kAtOnce][2][4];
#pragma unroll
    for (int i = 0; i < 8 * kAtOnce; ++i) {
      Tile& tile = tiles[i / 8][i / 4 % 2][i % 4];
      const uint32_t neuron = places.neuron(first + i / 8, i / 4 % 2, i % 4);
      tile = {};
      if (neuron == kNobody) continue;
      Format::read(w, kNeuronBlock * part.block + neuron, blockIdx.x, quad, part.whole, tile);
    }
#pragma unroll
    for (int i = 0; i < 4 * kAtOnce; ++i) {
      const int step = i / 4, half = i / 2 % 2, r = i % 2;
      uint32_t rows[4], columns[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        rows[n] = Format::codes(w, tiles[step][r][n], half, quad, 0, part.whole);
      }
      transpose(rows, columns);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        out->a[first + step][half][n / 2][2 * r + n % 2] = columns[n];
      }
    }
  }
}

// Of a tile's four tokens what all lanes have of them, joined -> in lane (g, t) that of token g
// / 2.
template <class T, class Join>
__device__ inline T join_lanes(const T (&v)[kTokensOfTile], Join join) {
  const bool upper = (lane_index() & 16) != 0, odd = (lane_index() & 8) != 0;
  const T a = join(upper ? v[2] : v[0], shuffle_xor(upper ? v[0] : v[2], 16));
  const T b = join(upper ? v[3] : v[1], shuffle_xor(upper ? v[1] : v[3], 16));
  T own = join(odd ? b : a, shuffle_xor(odd ? a : b, 8));
  for (int lanes = 4; lanes > 0; lanes /= 2) own = join(own, shuffle_xor(own, lanes));
  return own;
}

// -> what lane (g, t) has for token g / 2, [g / 2]; until the warp's next call.
template <class T>
__device__ inline const T* tell_lanes(T own) {
  __shared__ T of_tokens[kWarps][kTokensOfTile];
  sync_warp();
  if (lane_index() % 8 == 0) of_tokens[warp_index()][lane_index() / 8] = own;
  sync_warp();
  return of_tokens[warp_index()];
}

// The activations of a tile's tokens, made integers but for the scales of the neurons: each lane
// has those of its own places.
struct Activations {
  float values[kTokensOfTile][2];
  float from;  // of token t

  __device__ void read(const DownArgs& args, const Part& part, const Places& places,
                       uint32_t first) {
    const uint32_t begin = kNeuronBlock * part.block;
    const float2 most =
        read_shared(reinterpret_cast<const float2*>(args.weights.most + begin + 2 * lane_index()));
    // A token's scale is of all neurons of the block, whichever part they are in.
    float tops[kTokensOfTile];
#pragma unroll
    for (uint32_t i = 0; i < kTokensOfTile; ++i) {
      const float* const at = args.activations + uint64_t{first + i} * args.stride + begin;
      const bool there = first + i < args.rows;
      float2 v = {0, 0};
      if (there) v = read_shared(reinterpret_cast<const float2*>(at + 2 * lane_index()));
      tops[i] = fmaxf(size_of(v.x * most.x), size_of(v.y * most.y));
      values[i][0] = v.x;
      values[i][1] = v.y;
      if (args.masks != nullptr && there) take_places(args, part, places, first + i, at, values[i]);
    }
    const float top = join_lanes(tops, [](float a, float b) { return fmaxf(a, b); });
    const Scale scale = scale_for(top, args.activation_bits);
    from = tell_lanes(scale.from)[lane_index() % 4];
    const float* const to = tell_lanes(scale.to);
#pragma unroll
    for (uint32_t i = 0; i < 2 * kTokensOfTile; ++i) {
      float& v = values[i / 2][i % 2];
      v = to[i / 2] == 0.0f ? 0.0f : v * to[i / 2];
    }
  }

  __device__ static void take_places(const DownArgs& args, const Part& part, const Places& places,
                                     uint32_t row, const float* activations, float (&to)[2]) {
    uint2 own = {~0u, ~0u};
    if (part.split) {
      own = coarse_mask(args, row, part.block);
      if (part.whole) own = {~own.x, ~own.y};
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t neuron = places.own[i];
      const bool counts = neuron != kNobody && has_bit(own, neuron);
      to[i] = counts ? read_shared(activations + neuron) : 0.0f;
    }
  }

  // What is not finite, or a number, counts as infinite.
  __device__ static float size_of(float v) {
    const float size = fabsf(v);
    return size <= 3.4e38f ? size : float_of_bits(0x7f800000u);
  }

  // As integers for a group of columns -> operands of instructions, and the sum of zeros times the
  // integers of token t.
  __device__ int32_t quantize(const Weights& w, const Part& part, const Places& places,
                              uint32_t group, uint32_t (&b)[2][2]) const {
    // [half of a token][place]; rows of 20 words are in different banks.
    __shared__ uint32_t operands[kWarps][2 * kTokensOfTile][20];
    uint32_t (*const operand)[20] = operands[warp_index()];
    const uint32_t lane = lane_index(), g = lane / 4, t = lane % 4;
    float scales[2] = {0, 0};
    int32_t zeros[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (places.own[i] == kNobody) continue;
      const uint64_t at = uint64_t{kNeuronBlock * part.block + places.own[i]} * w.groups + group;
      scales[i] = float_of_half(read_shared(w.scales + at));
      zeros[i] = read_shared(w.zeros + at);
    }
    int32_t offsets[kTokensOfTile];
    sync_warp();
#pragma unroll
    for (uint32_t i = 0; i < kTokensOfTile; ++i) {
      const int32_t one = round_to_int(values[i][0] * scales[0]);
      const int32_t two = round_to_int(values[i][1] * scales[1]);
      offsets[i] = one * zeros[0] + two * zeros[1];
      // v = 256 upper + lower, both signed.
      const uint32_t lower = byte_perm(one, two, 0x0040);
      const uint32_t upper = byte_perm(one + 128, two + 128, 0x0051);
      reinterpret_cast<uint16_t*>(operand[2 * i])[lane] = static_cast<uint16_t>(upper);
      reinterpret_cast<uint16_t*>(operand[2 * i + 1])[lane] = static_cast<uint16_t>(lower);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = operand[g][4 * i + t];
    const int32_t offset = join_lanes(offsets, [](int32_t x, int32_t y) { return x + y; });
    return tell_lanes(offset)[t];
  }
};

}  // namespace cuda
}  // namespace sk
