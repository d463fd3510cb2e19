#include "model.hpp"

#include <algorithm>
#include <system_error>

#include "error.hpp"
#include "guard.hpp"
#include "isa.hpp"
#include "matrix.hpp"
#include "registry.hpp"
#include "scan.hpp"

namespace sk {

namespace {

const Kernels& kernels_for(sk_isa isa) {
#if defined(__x86_64__)
  if (isa == SK_ISA_AMX) return kernels_amx();
  if (isa == SK_ISA_AVX512) return kernels_avx512();
  if (isa == SK_ISA_AVX2) return kernels_avx2();
#endif
  (void)isa;
  return kernels_portable();
}

static_assert(SK_MAX_HEAD_DIM == kMaxHeadDim && kMostHeadsOfGroup == kAttentionRows);

// A partition is never larger than one call of `down`.
uint32_t partitions_of(uint32_t blocks) {
  constexpr uint32_t kMost = kMaxDownNeurons / SK_NEURON_BLOCK;
  const uint32_t needed = (blocks + kMost - 1) / kMost;
  return std::min<uint32_t>(std::max<uint32_t>(needed, SK_PARTITIONS), blocks);
}

MatrixKinds kinds_of(const Kernels& kernels, uint32_t activation_bits) {
  const Products* integers = activation_bits == 16 ? &kernels.integer16 : &kernels.integer8;
  return {&kernels.bfloat16, integers, kernels.has_prompts ? &kernels.prompts : integers,
          kernels.all_finite};
}

int32_t create(const sk_model_args& args, sk_model_info* info) {
  SK_TRY(check_range("threads", args.threads, 1, SK_MAX_THREADS));
  if (args.device != 0 || args.graphs != 0 || args.stream != 0) {
    return fail(SK_STATUS_UNSUPPORTED,
                "device is %" PRIu32 ", graphs %" PRIu32 " and stream %" PRIu64
                "; this library computes on the CPU, where they are 0",
                args.device, args.graphs, args.stream);
  }
  sk_isa isa;
  SK_TRY(resolve_isa(args.isa, &isa));
  auto model = std::make_shared<Model>(args.threads, args.core_copy_bytes);
  model->isa = isa;
  model->kernels = &kernels_for(isa);
  const MatrixKinds kinds = kinds_of(*model->kernels, args.activation_bits);
  SK_TRY(take_description(args, kinds, model.get()));
  for (Layer& layer : model->layers) layer.partitions = partitions_of(layer.blocks);
  model->kv = args.kv_bits == 16 ? &model->kernels->kv_bfloat16 : &model->kernels->kv_int8;
  SK_TRY(take_scan(args, kinds, model.get()));
  info->model = Registry<Model>::get().add(model);
  info->kv_block_bytes = model->kv_bytes;
  info->device_bytes = 0;
  info->isa = isa;
  info->threads = args.threads;
  return SK_STATUS_OK;
}

}  // namespace

}  // namespace sk

int32_t sk_model_create(const sk_model_args* args, sk_model_info* info) {
  if (const int32_t status = sk::check_struct(args, "sk_model_args")) return status;
  if (const int32_t status = sk::check_struct(info, "sk_model_info")) return status;
  return sk::guarded([&] { return sk::create(*args, info); });
}

int32_t sk_model_destroy(uint64_t handle) { return sk::Registry<sk::Model>::get().destroy(handle); }
