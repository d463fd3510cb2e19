// From a decoder as the ABI describes it to a copy in the memory of a GPU.
#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"

namespace sk {
namespace cuda {
namespace {

constexpr size_t kStagingBytes = 16 << 20;
constexpr uint32_t kBlocksOfSlice = 8, kMostSlices = 8;  // of the down product

bool all_finite(const uint16_t* row, size_t n) {
  uint32_t wrong = 0;
  for (size_t i = 0; i < n; ++i) wrong |= static_cast<uint32_t>((row[i] & 0x7f80) == 0x7f80);
  return wrong == 0;
}

float number_of_half(uint16_t half) {  // not negative, finite
  const int exponent = half >> 10, fraction = half & 0x3ff;
  return exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                       : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

// Lays a model's tensors out in device memory, and copies them there through pinned memory; without
// a model's memory it only counts.
class Upload {
 public:
  Upload(Model& model, uint8_t* base) : model_(model), pieces_(base), counting_(base == nullptr) {}

  // fill(to, first, count) writes rows [first, first + count) of `row_bytes` each.
  template <typename T, typename Fill>
  const T* rows(size_t count, size_t row_bytes, Fill&& fill) {
    uint8_t* at = pieces_.take<uint8_t>(count * row_bytes);
    const size_t step = std::max<size_t>(1, kStagingBytes / std::max<size_t>(row_bytes, 1));
    for (size_t first = 0; !counting_ && failed_ == 0 && first < count; first += step) {
      const size_t some = std::min(step, count - first);
      failed_ = model_.staging.reserve(std::max(kStagingBytes, row_bytes));
      if (failed_ != 0) break;
      fill(model_.staging.data(), first, some);
      failed_ = copy_in(model_.device, model_.stream, at + first * row_bytes, model_.staging.data(),
                        some * row_bytes);
      if (failed_ == 0) failed_ = wait(model_.device, model_.stream);
    }
    return reinterpret_cast<const T*>(at);
  }
  template <typename T>
  const T* vector(const T* data, size_t count) {
    if (data == nullptr) return nullptr;
    return rows<T>(count, sizeof(T), [&](uint8_t* to, size_t first, size_t some) {
      std::memcpy(to, data + first, some * sizeof(T));
    });
  }
  const uint8_t* plane(const uint8_t* data, size_t stride, size_t count, size_t bytes,
                       uint64_t* device_stride) {
    *device_stride = round_up(bytes, 16);
    return rows<uint8_t>(count, *device_stride, [&](uint8_t* to, size_t first, size_t some) {
      for (size_t i = 0; i < some; ++i) {
        std::memcpy(to + i * *device_stride, data + (first + i) * stride, bytes);
        std::memset(to + i * *device_stride + bytes, 0, *device_stride - bytes);
      }
    });
  }
  // From [row tiles][groups][SK_ROW_TILE] to [rows][groups].
  template <typename T>
  const T* by_row(const T* data, size_t count, size_t groups) {
    return rows<T>(count, groups * sizeof(T), [&](uint8_t* to, size_t first, size_t some) {
      T* out = reinterpret_cast<T*>(to);
      for (size_t i = 0; i < some; ++i) {
        const size_t row = first + i;
        const T* from = data + row / SK_ROW_TILE * groups * SK_ROW_TILE + row % SK_ROW_TILE;
        for (size_t g = 0; g < groups; ++g) *out++ = from[g * SK_ROW_TILE];
      }
    });
  }
  const float* most(const Matrix& from, size_t count) {
    return rows<float>(count, sizeof(float), [&](uint8_t* to, size_t first, size_t some) {
      float* out = reinterpret_cast<float*>(to);
      for (size_t i = 0; i < some; ++i) {
        const size_t row = first + i;
        const uint16_t* scales =
            from.scales + row / SK_ROW_TILE * from.groups * SK_ROW_TILE + row % SK_ROW_TILE;
        uint16_t top = 0;  // of numbers that are not negative the bits are in their order
        for (size_t g = 0; g < from.groups; ++g) top = std::max(top, scales[g * SK_ROW_TILE]);
        out[i] = number_of_half(top);
      }
    });
  }
  Weights weights(const Matrix& from, size_t rows) {
    Weights to = {};
    to.bits = from.bits;
    to.low_bits = from.low_bits;
    to.rows = static_cast<uint32_t>(round_up(rows, SK_ROW_TILE));
    to.columns = from.columns;
    to.group = from.group;
    to.groups = from.groups;
    to.rank = from.rank;
    to.factors = from.factors;
    to.codes =
        plane(from.codes, from.stride, to.rows, size_t{to.columns} * to.bits / 8, &to.stride);
    if (from.low != nullptr) {
      to.low = plane(from.low, from.low_stride, to.rows, size_t{to.columns} * to.low_bits / 8,
                     &to.low_stride);
    }
    if (from.bits == 16) return to;
    to.scales = by_row(from.scales, to.rows, to.groups);
    to.zeros = by_row(from.zeros, to.rows, to.groups);
    to.most = most(from, to.rows);
    return to;
  }
  Basis basis(const Matrix& from, uint32_t rank) {
    Basis to;
    if (rank != 0) {
      to.rows = plane(from.codes, from.stride, rank, size_t{from.columns} * 2, &to.stride);
    }
    return to;
  }
  size_t used() const { return pieces_.used(); }
  int32_t failed() const { return failed_; }

 private:
  Model& model_;
  Pieces pieces_;
  const bool counting_;
  int32_t failed_ = 0;
};

const Correction* upload_corrections(Upload& upload, const Model& model, size_t layer) {
  if (model.num_corrections == 0) return nullptr;
  std::vector<Correction> all(model.num_corrections);
  for (size_t i = 0; i < all.size(); ++i) {
    const sk::Correction& from = model.shape.corrections[i * model.shape.layers.size() + layer];
    all[i].rank = from.rank;
    if (from.rank == 0) continue;
    const Basis inputs = upload.basis(from.inputs, kMostCorrectionRank);
    const Basis outputs = upload.basis(from.outputs, kMostCorrectionRank);
    all[i].inputs = inputs.rows;
    all[i].inputs_stride = inputs.stride;
    all[i].outputs = outputs.rows;
    all[i].outputs_stride = outputs.stride;
  }
  return upload.vector(all.data(), all.size());
}

DeviceLayer upload_layer(Upload& upload, const Model& model, size_t index) {
  const Description& shape = model.shape;
  const Layer& from = shape.layers[index];
  const size_t heads = from.heads + 2 * size_t{from.kv_heads};
  const size_t neurons = size_t{from.blocks} * SK_NEURON_BLOCK;
  DeviceLayer to = {};
  to.qkv = upload.weights(from.qkv, heads * shape.dim);
  to.output = upload.weights(from.output, shape.hidden);
  to.gate = upload.weights(from.gate, neurons);
  to.up = upload.weights(from.up, neurons);
  to.down = upload.weights(from.down, neurons);
  to.qkv_basis = upload.basis(from.qkv_basis, from.qkv.rank);
  to.output_basis = upload.basis(from.output_basis, from.output.rank);
  to.gate_up_basis = upload.basis(from.gate_up_basis, from.gate.rank);
  to.down_basis = upload.basis(from.down_basis, from.down.rank);
  to.attention_norm = upload.vector(from.attention_norm, shape.hidden);
  to.mlp_norm = upload.vector(from.mlp_norm, shape.hidden);
  to.qkv_bias = upload.vector(from.qkv_bias, heads * shape.dim);
  to.output_bias = upload.vector(from.output_bias, shape.hidden);
  to.down_bias = upload.vector(from.down_bias, shape.hidden);
  to.q_norm = upload.vector(from.q_norm, shape.head_dim);
  to.k_norm = upload.vector(from.k_norm, shape.head_dim);
  if (!from.planes_factors.empty()) {
    to.planes_factors = upload.vector(from.planes_factors.data(), neurons);
  }
  if (!from.gate_factors.empty()) {
    to.gate_factors = upload.vector(from.gate_factors.data(), neurons);
  }
  to.corrections = upload_corrections(upload, model, index);
  to.slices = std::clamp(from.blocks / kBlocksOfSlice, 1u, kMostSlices);
  return to;
}

void upload_model(Upload& upload, Model* model) {
  const Description& shape = model->shape;
  model->layers.clear();
  for (size_t i = 0; i < shape.layers.size(); ++i) {
    model->layers.push_back(upload_layer(upload, *model, i));
  }
  model->embedding = upload.weights(shape.embedding, shape.vocab);
  const bool tied = shape.lm_head.codes == shape.embedding.codes;
  model->lm_head = tied ? model->embedding : upload.weights(shape.lm_head, shape.vocab);
  model->norm = upload.vector(shape.norm, shape.hidden);
  model->frequencies = upload.vector(shape.rope_frequencies.data(), shape.rope_frequencies.size());
}

// The buffers of a pass; the sizes are the largest of all layers.
void place_buffers(Model* model, Pieces* pieces) {
  const Description& shape = model->shape;
  size_t projected = 0, queries = 0, inputs = shape.columns, halves = 0, groups = 1, parts = 0;
  model->parts_stride = 0;
  const auto operand = [&](const Weights& of) {
    inputs = std::max<size_t>(inputs, of.columns);
    halves = std::max<size_t>(halves, size_t{of.columns} * (of.bits == 16 ? 2 : 1));
    groups = std::max<size_t>(groups, of.groups);
  };
  for (size_t i = 0; i < shape.layers.size(); ++i) {
    const Layer& layer = shape.layers[i];
    const DeviceLayer& own = model->layers[i];
    projected = std::max(projected, (layer.heads + 2 * size_t{layer.kv_heads}) * shape.dim);
    queries = std::max<size_t>(queries, size_t{layer.heads} * shape.dim);
    for (const Weights* of : {&own.qkv, &own.output, &own.gate}) operand(*of);
    model->parts_stride = std::max(model->parts_stride, own.down.columns);
    parts = std::max(parts, size_t{own.slices} * own.down.columns);
  }
  operand(model->lm_head);
  model->normed_stride = static_cast<uint32_t>(inputs);
  model->neurons = static_cast<uint32_t>(round_up(shape.widest, SK_NEURON_BLOCK));
  model->groups = static_cast<uint32_t>(groups);
  constexpr size_t kRows = kPassRows;
  const size_t half = shape.head_dim / 2;
  Buffers& b = model->buffers;
  b.x = pieces->take<float>(kRows * shape.hidden);
  b.projected = pieces->take<float>(kRows * projected);
  b.queries = pieces->take<float>(kRows * queries);
  b.normed = pieces->take<float>(kRows * inputs);
  b.activations = pieces->take<float>(kRows * model->neurons);
  b.parts = pieces->take<float>(kRows * parts);
  b.cos = pieces->take<float>(kRows * half);
  b.sin = pieces->take<float>(kRows * half);
  b.squares = pieces->take<float>(kChoosingTokens * groups);
  b.z = pieces->take<float>(kChoosingTokens * kMostCorrectionRank);
  b.logits = pieces->take<float>(size_t{kHeadRows} * shape.vocab);
  b.halves = pieces->take<uint8_t>(2 * kRows * halves);
  b.operand_scales = pieces->take<float>(kRows * groups);
  b.operand_offsets = pieces->take<float>(kRows * groups);
  b.masks = pieces->take<uint16_t>(kReadKinds * (kChoosingTokens + 1) * model->neurons / 16);
  b.head_results = reinterpret_cast<uint8_t*>(
      pieces->take<float>(2 * size_t{kHeadRows} * (kMostCandidates + 1)));
}

int32_t check_device_args(const sk_model_args& args) {
  if (args.threads != 1 || args.isa != SK_ISA_AUTO || args.graphs > 1 ||
      args.core_copy_bytes != 0) {
    return fail(SK_STATUS_BAD_VALUE,
                "threads is %" PRIu32 ", isa %" PRId32 ", graphs %" PRIu32
                " and core_copy_bytes %" PRIu64 "; for a GPU they are 1, 0, 0 or 1, and 0",
                args.threads, args.isa, args.graphs, args.core_copy_bytes);
  }
  SK_TRY(check_struct(&args.scan, "scan"));
  if (args.scan.codes.data != nullptr) {
    return fail(SK_STATUS_UNSUPPORTED, "there is a scan of the LM head; a GPU takes none");
  }
  SK_TRY(check_struct(&args.reduce, "sk_reduce"));
  if (args.reduce.add_up != nullptr) {
    return fail(SK_STATUS_UNSUPPORTED, "reduce.add_up is given; a GPU takes none");
  }
  return SK_STATUS_OK;
}

// In one piece each, so that what they need can be told.
int32_t reserve(Model* model, size_t weight_bytes, size_t work_bytes) {
  const int32_t status = model->weights.reserve(weight_bytes);
  return status != SK_STATUS_OK ? status : model->work.reserve(work_bytes);
}

}  // namespace

Model::~Model() {
  if (own_stream) end_stream(device, stream);
}

int32_t make_model(const sk_model_args& args, std::shared_ptr<Model>* out) {
  SK_TRY(check_device_args(args));
  auto model = std::make_shared<Model>(args.device);
  SK_TRY(take_description(args, {nullptr, nullptr, nullptr, all_finite}, &model->shape));
  model->num_corrections = args.num_corrections;
  model->stream = args.stream;
  SK_TRY(begin_stream(args.device, &model->stream));
  model->own_stream = args.stream == 0;
  if (args.graphs == 1) model->graphs.allow();
  Upload count(*model, nullptr);
  upload_model(count, model.get());
  Pieces sizes(nullptr);
  place_buffers(model.get(), &sizes);
  SK_TRY(reserve(model.get(), count.used(), sizes.used()));
  Upload upload(*model, model->weights.data());
  upload_model(upload, model.get());
  SK_TRY(upload.failed());
  Pieces buffers(model->work.data());
  place_buffers(model.get(), &buffers);
  *out = std::move(model);
  return SK_STATUS_OK;
}

}  // namespace cuda
}  // namespace sk
