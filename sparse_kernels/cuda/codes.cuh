// The formats of weights, and how the codes of integers are got out of their bytes.
//
// Codes are read in tiles of 64 columns, see sk_plane: two halves of 32 columns, each eight quads
// of four. A lane reads kQuads quads, 1 or 2, from `quad` on, of both halves: these are in the same
// words, but for codes of 8 bits. A word of codes has those of a quad, a byte each.
#pragma once

#include "rounding.cuh"

namespace sk {
namespace cuda {

template <int kQuads>
struct Words {
  uint32_t at[kQuads];
};

__device__ inline Words<1> read_words(const uint8_t* at, Words<1>*) {
  return {{read_once(reinterpret_cast<const uint32_t*>(at))}};
}
__device__ inline Words<2> read_words(const uint8_t* at, Words<2>*) {
  const uint2 v = read_once(reinterpret_cast<const uint2*>(at));
  return {{v.x, v.y}};
}
template <int kQuads>
__device__ inline void read_words(const uint8_t* at, Words<kQuads>& out) {
  out = read_words(at, static_cast<Words<kQuads>*>(nullptr));
}

struct Bfloat16 {};

struct Int8 {
  template <int kQuads>
  struct Tile {
    Words<kQuads> halves[2];
  };
  template <int kQuads>
  __device__ static void read(const Weights& w, uint32_t row, uint32_t tile, uint32_t quad,
                              bool /*whole*/, Tile<kQuads>& out) {
    const uint8_t* at = w.codes + row * w.stride + 64 * tile + 4 * quad;
    read_words(at, out.halves[0]);
    read_words(at + 32, out.halves[1]);
  }
  template <int kQuads>
  __device__ static uint32_t codes(const Weights&, const Tile<kQuads>& tile, int half, uint32_t,
                                   int i, bool /*whole*/) {
    return tile.halves[half].at[i];
  }
  __device__ static float unit(const Weights&) { return 1.0f; }
  __device__ static float middle(const Weights&) { return 0.0f; }
};

struct Int4 {
  template <int kQuads>
  struct Tile {
    Words<kQuads> words;
  };
  template <int kQuads>
  __device__ static void read(const Weights& w, uint32_t row, uint32_t tile, uint32_t quad,
                              bool /*whole*/, Tile<kQuads>& out) {
    read_words(w.codes + row * w.stride + 32 * tile + 4 * quad, out.words);
  }
  template <int kQuads>
  __device__ static uint32_t codes(const Weights&, const Tile<kQuads>& tile, int half, uint32_t,
                                   int i, bool /*whole*/) {
    return tile.words.at[i] >> (4 * half) & 0x0f0f0f0fu;
  }
  __device__ static float unit(const Weights&) { return 1.0f; }
  __device__ static float middle(const Weights&) { return 0.0f; }
};

// A plane of 4, 3, 2 or 1 bits.
template <int kQuads>
struct Plane {
  Words<kQuads> words;  // of 4 or 2 bits
  uint2 ones;           // bits of both halves
};

template <int kQuads>
__device__ inline void read_plane(const uint8_t* row, uint32_t bits, uint32_t tile, uint32_t quad,
                                  Plane<kQuads>& out) {
  const uint8_t* at = row + 8 * bits * tile;
  if (bits != 1) read_words(at + 4 * (bits == 4 ? quad : quad % 4), out.words);
  if (bits % 2 == 1) out.ones = read_once(reinterpret_cast<const uint2*>(at + 8 * (bits - 1)));
}

template <int kQuads>
__device__ inline uint32_t plane_codes(const Plane<kQuads>& plane, uint32_t bits, int half,
                                       uint32_t quad, int i) {
  if (bits == 4) return plane.words.at[i] >> (4 * half) & 0x0f0f0f0fu;
  const uint32_t two = plane.words.at[i] >> (4 * half + 2 * (quad / 4)) & 0x03030303u;
  if (bits == 2) return two;
  const uint32_t four = (half == 0 ? plane.ones.x : plane.ones.y) >> (4 * (quad + i)) & 15;
  const uint32_t one = four * 0x00204081u & 0x01010101u;  // bit i to byte i
  return bits == 1 ? one : two << 1 | one;
}

// Two planes: 4 + 4, 2 + 2 or 3 + 1 bits. Read not `whole`, the lower one counts as the middle of
// its range.
struct Planes {
  template <int kQuads>
  struct Tile {
    Plane<kQuads> upper, lower;
  };
  template <int kQuads>
  __device__ static void read(const Weights& w, uint32_t row, uint32_t tile, uint32_t quad,
                              bool whole, Tile<kQuads>& out) {
    read_plane(w.codes + row * w.stride, w.bits, tile, quad, out.upper);
    if (whole) read_plane(w.low + row * w.low_stride, w.low_bits, tile, quad, out.lower);
  }
  template <int kQuads>
  __device__ static uint32_t codes(const Weights& w, const Tile<kQuads>& tile, int half,
                                   uint32_t quad, int i, bool whole) {
    const uint32_t upper = plane_codes(tile.upper, w.bits, half, quad, i) << w.low_bits;
    if (!whole) return upper | 0x01010101u << (w.low_bits - 1);
    return upper | plane_codes(tile.lower, w.low_bits, half, quad, i);
  }
  __device__ static float unit(const Weights&) { return 1.0f; }
  __device__ static float middle(const Weights&) { return 0.0f; }
};

// The upper of two planes, with the mean of what the lower one may be.
struct UpperPlane {
  template <int kQuads>
  using Tile = Plane<kQuads>;
  template <int kQuads>
  __device__ static void read(const Weights& w, uint32_t row, uint32_t tile, uint32_t quad,
                              bool /*whole*/, Tile<kQuads>& out) {
    read_plane(w.codes + row * w.stride, w.bits, tile, quad, out);
  }
  template <int kQuads>
  __device__ static uint32_t codes(const Weights& w, const Tile<kQuads>& tile, int half,
                                   uint32_t quad, int i, bool /*whole*/) {
    return plane_codes(tile, w.bits, half, quad, i);
  }
  // An element is scale (unit code + middle - zero).
  __device__ static float unit(const Weights& w) { return static_cast<float>(1u << w.low_bits); }
  __device__ static float middle(const Weights& w) { return (unit(w) - 1.0f) / 2.0f; }
};

}  // namespace cuda
}  // namespace sk
