#include "description.hpp"

#include <cmath>
#include <cstring>

#include "error.hpp"

namespace sk {

int32_t check_vector(const char* name, const float* data, size_t count, bool required) {
  if (data == nullptr) {
    if (!required) return SK_STATUS_OK;
    return fail(SK_STATUS_NULL_POINTER, "%s is a null pointer", name);
  }
  for (size_t i = 0; i < count; ++i) {
    if (!std::isfinite(data[i])) {
      return fail(SK_STATUS_BAD_VALUE, "%s has a value that is not finite at %zu", name, i);
    }
  }
  return SK_STATUS_OK;
}

namespace {

int32_t take_factors(const char* name, const float* data, const Layer& layer,
                     std::vector<float>* out) {
  if (data == nullptr) return SK_STATUS_OK;
  out->assign(size_t{layer.blocks} * SK_NEURON_BLOCK, 0.0f);
  for (uint32_t i = 0; i < layer.neurons; ++i) {
    if (!(data[i] >= 0 && std::isfinite(data[i]))) {
      return fail(SK_STATUS_BAD_VALUE, "%s has %g at %" PRIu32 "; they must be finite and >= 0",
                  name, static_cast<double>(data[i]), i);
    }
    (*out)[i] = data[i];
  }
  return SK_STATUS_OK;
}

int32_t take_bases(const sk_layer& from, uint64_t attention_inputs, const MatrixKinds& kinds,
                   uint64_t hidden, Layer* layer) {
  const Matrix &gate = layer->gate, &up = layer->up;
  if (gate.rank != up.rank) {
    return fail(SK_STATUS_BAD_VALUE,
                "rank of gate is %" PRIu32 " and of up %" PRIu32 "; it must be the same", gate.rank,
                up.rank);
  }
  if (gate.rank != 0 && gate.bits + gate.low_bits != up.bits + up.low_bits) {
    return fail(SK_STATUS_BAD_VALUE,
                "gate has %" PRIu32 " bits and up %" PRIu32
                "; with a low-rank term it must be as many",
                gate.bits + gate.low_bits, up.bits + up.low_bits);
  }
  SK_TRY(take_basis("qkv_basis", from.qkv_basis, layer->qkv, hidden, kinds, &layer->qkv_basis));
  SK_TRY(take_basis("output_basis", from.output_basis, layer->output, attention_inputs, kinds,
                    &layer->output_basis));
  SK_TRY(
      take_basis("gate_up_basis", from.gate_up_basis, gate, hidden, kinds, &layer->gate_up_basis));
  return take_basis("down_basis", from.down_basis, layer->down, hidden, kinds, &layer->down_basis);
}

int32_t take_layer(Description& model, const sk_layer& from, const MatrixKinds& kinds) {
  SK_TRY(check_struct(&from, "sk_layer"));
  SK_TRY(check_range("num_heads", from.num_heads, 1, SK_MAX_HEADS));
  SK_TRY(check_range("num_kv_heads", from.num_kv_heads, 1, from.num_heads));
  if (from.num_heads % from.num_kv_heads != 0 ||
      from.num_heads / from.num_kv_heads > kMostHeadsOfGroup) {
    return fail(SK_STATUS_BAD_SIZE,
                "num_heads is %" PRIu32 "; it must be 1 to %" PRIu32 " times num_kv_heads %" PRIu32,
                from.num_heads, kMostHeadsOfGroup, from.num_kv_heads);
  }
  SK_TRY(check_range("intermediate_size", from.intermediate_size, 1, SK_MAX_DIM));
  Layer layer = {};
  layer.heads = from.num_heads;
  layer.kv_heads = from.num_kv_heads;
  layer.neurons = from.intermediate_size;
  layer.blocks = (from.intermediate_size + SK_NEURON_BLOCK - 1) / SK_NEURON_BLOCK;
  layer.window = from.window;
  const uint64_t heads = from.num_heads + 2 * uint64_t{from.num_kv_heads};
  const uint64_t neurons = uint64_t{layer.blocks} * SK_NEURON_BLOCK;
  const uint64_t inputs = uint64_t{from.num_heads} * model.head_dim;
  SK_TRY(take_layer_matrix("qkv", from.qkv, heads * model.dim, model.hidden, kinds, &layer.qkv));
  SK_TRY(take_layer_matrix("output", from.output, model.hidden, inputs, kinds, &layer.output));
  SK_TRY(take_layer_matrix("gate", from.gate, neurons, model.hidden, kinds, &layer.gate));
  SK_TRY(take_layer_matrix("up", from.up, neurons, model.hidden, kinds, &layer.up));
  SK_TRY(take_layer_matrix("down", from.down, neurons, model.hidden, kinds, &layer.down));
  if (layer.gate.group != layer.up.group) {
    return fail(SK_STATUS_BAD_VALUE,
                "group_size of gate is %" PRIu32 " and of up %" PRIu32 "; it must be the same",
                layer.gate.group, layer.up.group);
  }
  SK_TRY(take_bases(from, inputs, kinds, model.hidden, &layer));
  SK_TRY(take_factors("planes_factors", from.planes_factors, layer, &layer.planes_factors));
  SK_TRY(take_factors("gate_factors", from.gate_factors, layer, &layer.gate_factors));
  if (!layer.planes_factors.empty()) {
    if (layer.gate.low == nullptr || layer.up.low == nullptr) {
      return fail(SK_STATUS_BAD_VALUE,
                  "planes_factors are given; gate and up must be in two planes for them");
    }
    layer.gate_high = upper_bits(layer.gate);
    layer.up_high = upper_bits(layer.up);
    if (layer.down.low != nullptr) {
      // The upper half of the lower bits' range begins in the middle: 8 of 4 bits, 2 of 2, 1 of 1.
      const uint32_t bits = layer.down.low_bits;
      const uint8_t middle = bits == 4 ? 0x88 : bits == 2 ? 0xaa : 0xff;
      layer.middle.assign(size_t{layer.down.columns} * bits / 8, middle);
      layer.down_coarse = layer.down;
      layer.down_coarse.low = layer.middle.data();
      layer.down_coarse.low_stride = 0;
    }
  }
  SK_TRY(check_vector("attention_norm", from.attention_norm, model.hidden, true));
  SK_TRY(check_vector("mlp_norm", from.mlp_norm, model.hidden, true));
  SK_TRY(check_vector("qkv_bias", from.qkv_bias, heads * model.dim, false));
  SK_TRY(check_vector("output_bias", from.output_bias, model.hidden, false));
  SK_TRY(check_vector("down_bias", from.down_bias, model.hidden, false));
  SK_TRY(check_vector("q_norm", from.q_norm, model.head_dim, false));
  SK_TRY(check_vector("k_norm", from.k_norm, model.head_dim, false));
  layer.attention_norm = from.attention_norm;
  layer.mlp_norm = from.mlp_norm;
  layer.qkv_bias = from.qkv_bias;
  layer.output_bias = from.output_bias;
  layer.down_bias = from.down_bias;
  layer.q_norm = from.q_norm;
  layer.k_norm = from.k_norm;
  layer.kv_offset = model.kv_bytes;
  model.kv_bytes += from.num_kv_heads * model.kv_head_bytes;
  if (model.widest < layer.neurons) model.widest = layer.neurons;
  if (model.most_heads < layer.heads) model.most_heads = layer.heads;
  model.layers.push_back(std::move(layer));
  return SK_STATUS_OK;
}

// Of a KV block; one of 8 bits has a scale of 16 bits for each key and each value.
size_t kv_head_bytes(uint32_t bits, size_t dim) {
  const size_t numbers = 2 * SK_BLOCK_SIZE * dim;
  return bits == 16 ? numbers * 2 : numbers + 2 * SK_BLOCK_SIZE * sizeof(uint16_t);
}

int32_t check_args(const sk_model_args& args) {
  SK_TRY(check_range("hidden_size", args.hidden_size, 1, SK_MAX_DIM));
  SK_TRY(check_range("vocab_size", args.vocab_size, 1, SK_MAX_VOCAB));
  SK_TRY(check_range("head_dim", args.head_dim, 2, SK_MAX_HEAD_DIM));
  if (args.head_dim % 2 != 0) {
    return fail(SK_STATUS_BAD_SIZE, "head_dim is %" PRIu32 "; RoPE needs pairs", args.head_dim);
  }
  SK_TRY(check_range("num_layers", args.num_layers, 1, SK_MAX_LAYERS));
  SK_TRY(check_range("rope_rows", args.rope_rows, 1, SK_MAX_POSITIONS));
  if (!(args.rms_norm_eps > 0 && std::isfinite(args.rms_norm_eps))) {
    return fail(SK_STATUS_BAD_VALUE, "rms_norm_eps is %g; it must be finite and > 0",
                static_cast<double>(args.rms_norm_eps));
  }
  if (!(args.rope_scale > 0 && std::isfinite(args.rope_scale))) {
    return fail(SK_STATUS_BAD_VALUE, "rope_scale is %g; it must be finite and > 0",
                static_cast<double>(args.rope_scale));
  }
  if (args.activation_bits != 16 && args.activation_bits != 8) {
    return fail(SK_STATUS_BAD_VALUE, "activation_bits is %" PRIu32 "; it can be 16 or 8",
                args.activation_bits);
  }
  if (args.kv_bits != 16 && args.kv_bits != 8) {
    return fail(SK_STATUS_BAD_VALUE, "kv_bits is %" PRIu32 "; it can be 16 or 8", args.kv_bits);
  }
  if (args.layers == nullptr) return fail(SK_STATUS_NULL_POINTER, "layers is a null pointer");
  return check_struct(&args.reduce, "sk_reduce");
}

int32_t take_corrections(const sk_model_args& args, const MatrixKinds& kinds, Description* model) {
  SK_TRY(check_range("num_corrections", args.num_corrections, 0, SK_MAX_CORRECTIONS));
  if (args.num_corrections == 0) return SK_STATUS_OK;
  if (args.corrections == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "corrections is a null pointer");
  }
  model->corrections.resize(size_t{args.num_corrections} * args.num_layers);
  for (size_t i = 0; i < model->corrections.size(); ++i) {
    const sk_correction& from = args.corrections[i];
    Correction& to = model->corrections[i];
    SK_TRY(check_struct(&from, "sk_correction"));
    SK_TRY(check_range("a correction's rank", from.rank, 0, SK_MAX_CORRECTION_RANK));
    if (from.reserved != 0) {
      return fail(SK_STATUS_BAD_VALUE, "reserved is %" PRIu32 "; it must be 0", from.reserved);
    }
    to.rank = from.rank;
    if (from.rank == 0) continue;
    constexpr uint64_t kRows = SK_MAX_CORRECTION_RANK;
    SK_TRY(take_matrix("a correction's inputs", from.inputs, kRows, args.hidden_size, kinds,
                       &to.inputs));
    SK_TRY(take_matrix("a correction's outputs", from.outputs, kRows, args.hidden_size, kinds,
                       &to.outputs));
    if (to.inputs.bits != 16 || to.outputs.bits != 16) {
      return fail(SK_STATUS_UNSUPPORTED, "a correction has other elements than bfloat16");
    }
  }
  return SK_STATUS_OK;
}

}  // namespace

int32_t take_description(const sk_model_args& args, const MatrixKinds& kinds, Description* out) {
  SK_TRY(check_args(args));
  Description& model = *out;
  model.hidden = args.hidden_size;
  model.columns = static_cast<uint32_t>(round_up(args.hidden_size, SK_COLUMN_TILE));
  model.vocab = args.vocab_size;
  model.head_dim = args.head_dim;
  model.dim = static_cast<uint32_t>(round_up(args.head_dim, SK_ROW_TILE));
  model.eps = args.rms_norm_eps;
  model.rope_scale = args.rope_scale;
  model.rope_rows = args.rope_rows;
  model.reduce = args.reduce;
  model.activation_bits = args.activation_bits;
  model.kv_bits = args.kv_bits;
  model.kv_head_bytes = kv_head_bytes(args.kv_bits, model.dim);
  model.kv_bytes = 0;
  const size_t frequencies = size_t{args.rope_rows} * (args.head_dim / 2);
  SK_TRY(check_vector("rope_frequencies", args.rope_frequencies, frequencies, true));
  model.rope_frequencies.assign(args.rope_frequencies, args.rope_frequencies + frequencies);
  SK_TRY(check_vector("norm", args.norm, args.hidden_size, true));
  model.norm = args.norm;
  for (uint32_t i = 0; i < args.num_layers; ++i) SK_TRY(take_layer(model, args.layers[i], kinds));
  SK_TRY(take_matrix("embedding", args.embedding, args.vocab_size, args.hidden_size, kinds,
                     &model.embedding));
  if (model.embedding.bits != 16) {
    return fail(SK_STATUS_UNSUPPORTED, "embedding has %" PRIu32 " bits; it can have 16",
                model.embedding.bits);
  }
  if (std::memcmp(&args.lm_head, &args.embedding, sizeof(sk_matrix)) == 0) {
    model.lm_head = model.embedding;
  } else {
    SK_TRY(take_matrix("lm_head", args.lm_head, args.vocab_size, args.hidden_size, kinds,
                       &model.lm_head));
  }
  SK_TRY(take_corrections(args, kinds, &model));
  model.words = (model.widest + SK_NEURON_BLOCK - 1) / SK_NEURON_BLOCK;
  return SK_STATUS_OK;
}

}  // namespace sk
