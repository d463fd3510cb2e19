// activate_FORMAT_TILES, see ActivateArgs: the neurons of the feed-forward, and which of them each
// token uses, see sk_choice.
#pragma once

#include "product.cuh"

namespace sk {
namespace cuda {

// sk_choice_kind
constexpr uint32_t kChoiceCore = 0, kChoicePlanes = 1, kChoiceGate = 2;

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + exponential(-v)); }
__device__ inline float silu(float v) { return v / (1.0f + exponential(-v)); }

template <class Format>
constexpr bool kInPlanes = false;
template <>
constexpr bool kInPlanes<Planes> = true;

// What a token makes of a neuron.
struct Reads {
  uint32_t kind;
  bool looked, used, whole, down_whole;
};

// Of a block's rows those that some token wants. All threads come here.
__device__ inline uint32_t rows_wanted(bool wanted) {
  __shared__ uint32_t of_warps[kWarps];
  const uint32_t votes = ballot(wanted);
  if (lane_index() == 0) of_warps[warp_index()] = votes | votes >> 16;
  sync_threads();
  uint32_t all = 0;
  for (uint32_t warp = 0; warp < kWarps; ++warp) all |= of_warps[warp];
  sync_threads();
  return all & kAllRows;
}

__device__ inline Choice choice_of(const ActivateArgs& args, uint32_t token) {
  return args.choices[args.tokens[token].sequence];
}

// The neurons that a token may use.
__device__ inline Reads begin_reads(const ActivateArgs& args, uint32_t token, uint32_t neuron) {
  if (token >= args.rows) return {};
  const Choice choice = choice_of(args, token);
  bool core = neuron < args.neurons;
  if (core && choice.core != nullptr) {
    const uint64_t word =
        read_shared(choice.core + uint64_t{args.layer} * args.words + neuron / 64);
    core = (word >> neuron % 64 & 1) != 0;
  }
  return {choice.kind, core, core, core, core};
}

// What the lower bits of a row may change of a token's product: its variance.
__device__ inline float variance(const Weights& w, uint32_t row, const float* squares) {
  float sum = 0.0f;
  for (uint32_t group = 0; group < w.groups; ++group) {
    const float scale = float_of_half(read_shared(w.scales + uint64_t{row} * w.groups + group));
    sum = multiply_add(scale * scale, read_shared(squares + group), sum);
  }
  const float unit = UpperPlane::unit(w);
  return sum * ((unit * unit - 1.0f) / 12.0f);
}

// What is not a number is used, and read whole.
__device__ inline void choose_by_planes(const ActivateArgs& args, uint32_t token, uint32_t neuron,
                                        float gate, float up, Reads* reads) {
  const float* bounds = choice_of(args, token).thresholds + 3 * uint64_t{args.layer};
  const float* squares = args.squares + uint64_t{token} * args.gate.groups;
  const float factor = read_shared(args.planes_factors + neuron), opening = sigmoid(gate);
  const float activated = gate * opening, importance = fabsf(activated * up) * factor;
  const float slope = multiply_add(activated, 1.0f - opening, opening);
  const float gates = slope * slope * variance(args.gate, neuron, squares);
  const float ups = variance(args.up, neuron, squares);
  const float noise = multiply_add(gates, multiply_add(up, up, ups), activated * activated * ups);
  const float bound = read_shared(bounds + 1);
  reads->used = !(importance < read_shared(bounds));
  reads->whole = reads->used && !(noise * factor * factor < bound * bound);
  reads->down_whole =
      reads->used && (args.down_planes == 0 || !(importance < read_shared(bounds + 2)));
}

__device__ inline void choose_by_gate(const ActivateArgs& args, uint32_t token, uint32_t neuron,
                                      float gate, Reads* reads) {
  const float* bounds = choice_of(args, token).thresholds + 3 * uint64_t{args.layer};
  const float importance = fabsf(gate * sigmoid(gate)) * read_shared(args.gate_factors + neuron);
  reads->used = !(importance < read_shared(bounds));
  reads->whole = reads->down_whole = reads->used;
}

// All threads come here: each half of a warp has the neurons of a token.
__device__ inline void write_masks(const ActivateArgs& args, uint32_t token, const Reads& reads) {
  const bool kinds[kReadKinds] = {reads.looked, reads.used, reads.whole, reads.down_whole};
  const uint32_t words = args.stride / kRowsOfBlock;
#pragma unroll
  for (uint32_t kind = 0; kind < kReadKinds; ++kind) {
    uint16_t* to = args.masks + uint64_t{kind} * (args.rows + 1) * words + blockIdx.x;
    const uint32_t votes = ballot(kinds[kind]), all = rows_wanted(kinds[kind]);
    if (threadIdx.x == 0) to[uint64_t{args.rows} * words] = static_cast<uint16_t>(all);
    if (own_row() != 0 || token >= args.rows) continue;
    to[uint64_t{token} * words] = static_cast<uint16_t>(votes >> token % 2 * 16);
  }
}

// One token's gate and up for this thread's neuron, or 0 where nobody needs them.
template <class Format, int kTiles>
struct Chooser {
  const ActivateArgs& args;
  uint32_t first, token;
  float gate, up;
  Reads reads;

  __device__ uint32_t neuron() const { return first + own_row(); }

  template <class ReadAs>
  __device__ void multiply_both(uint32_t rows) {
    const Weights* const both[2] = {&args.gate, &args.up};
    float results[2][1];
    multiply_rows<ReadAs, kTiles, 2>(both, {first, rows}, args.operand, {0, args.rows}, results);
    gate = results[0][0];
    up = results[1][0];
  }
  __device__ float multiply_one(const Weights& weights, uint32_t rows) {
    const Weights* const one[1] = {&weights};
    float results[1][1];
    multiply_rows<Format, kTiles, 1>(one, {first, rows}, args.operand, {0, args.rows}, results);
    return results[0][0];
  }

  __device__ void by_planes() {
    const bool own = reads.kind == kChoicePlanes && reads.looked;
    const uint32_t rows = rows_wanted(own);
    if (rows == 0) return;
    multiply_both<UpperPlane>(rows);
    if (own) choose_by_planes(args, token, neuron(), gate, up, &reads);
  }
  // Gate and up of whatever is read whole, and choices by it.
  __device__ void read_whole() {
    const float upper_gate = gate, upper_up = up;
    const bool looks = reads.kind == kChoicePlanes ? reads.whole : reads.looked;
    const bool chooses = reads.kind == kChoiceGate && reads.looked;
    const uint32_t rows = rows_wanted(looks);
    if (rows_wanted(chooses) == 0) {
      if (rows != 0) multiply_both<Format>(rows);
    } else {
      gate = multiply_one(args.gate, rows);
      if (chooses) choose_by_gate(args, token, neuron(), gate, &reads);
      const uint32_t used = rows_wanted(reads.whole);
      if (used != 0) up = multiply_one(args.up, used);
    }
    if (reads.whole) return;
    gate = upper_gate;
    up = upper_up;
  }
};

template <class Format, int kTiles>
__device__ inline void activate_chosen(const ActivateArgs& args) {
  const uint32_t first = blockIdx.x * kRowsOfBlock;
  const uint32_t token = owns_result<kTiles>() ? own_token(0) : args.rows;
  Chooser<Format, kTiles> own = {args, first, token,
                                 0,    0,     begin_reads(args, token, first + own_row())};
  if constexpr (kInPlanes<Format>) own.by_planes();
  own.read_whole();
  write_masks(args, token, own.reads);
  if (token >= args.rows) return;
  args.activations[uint64_t{token} * args.stride + own.neuron()] =
      own.reads.used ? silu(own.gate) * own.up : 0.0f;
}

template <class Format, int kTiles>
__device__ inline void activate_all(const ActivateArgs& args) {
  const Tokens tokens = {blockIdx.y * kTokensOfTile * kTiles, args.rows};
  const Rows rows = {blockIdx.x * kRowsOfBlock, kAllRows};
  const Weights* const both[2] = {&args.gate, &args.up};
  float results[2][kPieces<kTiles>];
  multiply_rows<Format, kTiles, 2>(both, rows, args.operand, tokens, results);
  const uint32_t neuron = rows.first + own_row();
  if (!owns_result<kTiles>()) return;
#pragma unroll
  for (int piece = 0; piece < kPieces<kTiles>; ++piece) {
    const uint32_t token = own_token(piece);
    if (!tokens.has(token)) continue;
    args.activations[uint64_t{tokens.first + token} * args.stride + neuron] =
        neuron < args.neurons ? silu(results[0][piece]) * results[1][piece] : 0.0f;
  }
}

template <class Format, int kTiles>
__device__ inline void activate(const ActivateArgs& args) {
  if constexpr (kTiles <= kTilesOfPiece) {
    if (args.choices != nullptr) return activate_chosen<Format, kTiles>(args);
  }
  activate_all<Format, kTiles>(args);
}

SK_KERNEL(activate_bfloat16_1, ActivateArgs) { activate<Bfloat16, 1>(args); }
SK_KERNEL(activate_bfloat16_4, ActivateArgs) { activate<Bfloat16, 4>(args); }
SK_KERNEL(activate_bfloat16_8, ActivateArgs) { activate<Bfloat16, 8>(args); }
SK_KERNEL(activate_int8_1, ActivateArgs) { activate<Int8, 1>(args); }
SK_LARGE_KERNEL(activate_int8_4, ActivateArgs) { activate<Int8, 4>(args); }
SK_KERNEL(activate_int8_8, ActivateArgs) { activate<Int8, 8>(args); }
SK_KERNEL(activate_int4_1, ActivateArgs) { activate<Int4, 1>(args); }
SK_KERNEL(activate_int4_4, ActivateArgs) { activate<Int4, 4>(args); }
SK_KERNEL(activate_int4_8, ActivateArgs) { activate<Int4, 8>(args); }
SK_KERNEL(activate_planes_1, ActivateArgs) { activate<Planes, 1>(args); }
SK_LARGE_KERNEL(activate_planes_4, ActivateArgs) { activate<Planes, 4>(args); }
SK_KERNEL(activate_planes_8, ActivateArgs) { activate<Planes, 8>(args); }

}  // namespace cuda
}  // namespace sk
