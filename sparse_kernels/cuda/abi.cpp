// The functions of the ABI, for a GPU.
#include "error.hpp"
#include "forward_checks.hpp"
#include "guard.hpp"
#include "model.hpp"
#include "registry.hpp"

namespace sk {
namespace cuda {
namespace {

using Models = Registry<Model>;

int32_t create(const sk_model_args& args, sk_model_info* info) {
  std::shared_ptr<Model> model;
  SK_TRY(make_model(args, &model));
  info->model = Models::get().add(model);
  info->kv_block_bytes = model->shape.kv_bytes;
  info->device_bytes = model->weights.bytes() + model->work.bytes();
  info->isa = SK_ISA_CUDA;
  info->threads = 1;
  return SK_STATUS_OK;
}

int32_t check_left_logits(const Description& shape, const float* logits, uint64_t count) {
  if (logits == nullptr) return fail(SK_STATUS_NULL_POINTER, "logits is null");
  if (count == shape.vocab) return SK_STATUS_OK;
  return fail(SK_STATUS_BAD_SIZE, "count is %" PRIu64 ", it must be %" PRIu32, count, shape.vocab);
}

int32_t check_memory(uint64_t address, const void* host) {
  if (address != 0 && host != nullptr) return SK_STATUS_OK;
  return fail(SK_STATUS_NULL_POINTER, "an address is null");
}

}  // namespace
}  // namespace cuda
}  // namespace sk

int32_t sk_model_create(const sk_model_args* args, sk_model_info* info) {
  if (const int32_t status = sk::check_struct(args, "sk_model_args")) return status;
  if (const int32_t status = sk::check_struct(info, "sk_model_info")) return status;
  return sk::guarded([&] { return sk::cuda::create(*args, info); });
}

int32_t sk_model_destroy(uint64_t handle) { return sk::cuda::Models::get().destroy(handle); }

int32_t sk_forward(uint64_t handle, const sk_forward_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_forward_args")) return status;
  return sk::cuda::Models::get().call(
      handle, [&](const sk::cuda::Model& m) { return sk::check_forward(m.shape, *args, true); },
      [&](sk::cuda::Model& model) { return sk::cuda::run_forward(model, *args); });
}

int32_t sk_logits(uint64_t handle, const sk_logits_args* args) {
  if (const int32_t status = sk::check_struct(args, "sk_logits_args")) return status;
  return sk::cuda::Models::get().call(
      handle, [&](const sk::cuda::Model& m) { return sk::check_logits(m.shape, *args); },
      [&](sk::cuda::Model& model) { return sk::cuda::run_logits(model, *args); });
}

int32_t sk_device_count(uint32_t* count) {
  if (count == nullptr) return sk::fail(SK_STATUS_NULL_POINTER, "count is a null pointer");
  return sk::guarded([&] { return sk::cuda::device_count(count); });
}

int32_t sk_device_describe(uint32_t device, sk_device_info* info) {
  if (const int32_t status = sk::check_struct(info, "sk_device_info")) return status;
  return sk::guarded([&] { return sk::cuda::describe_device(device, info); });
}

int32_t sk_device_load(uint32_t device, const void* image, uint64_t bytes) {
  if (image == nullptr) return sk::fail(SK_STATUS_NULL_POINTER, "image is a null pointer");
  return sk::guarded([&] { return sk::cuda::load_code(device, image, bytes); });
}

int32_t sk_device_logits(uint64_t handle, uint32_t row, float* logits, uint64_t count) {
  return sk::cuda::Models::get().call(
      handle,
      [&](const sk::cuda::Model& m) { return sk::cuda::check_left_logits(m.shape, logits, count); },
      [&](sk::cuda::Model& model) { return sk::cuda::tell_left_logits(model, row, logits); });
}

int32_t sk_device_graphs(uint64_t handle, sk_graphs_info* info) {
  if (const int32_t status = sk::check_struct(info, "sk_graphs_info")) return status;
  return sk::cuda::Models::get().call(
      handle, [](const sk::cuda::Model&) { return SK_STATUS_OK; },
      [&](sk::cuda::Model& model) {
        model.graphs.tell(info);
        return SK_STATUS_OK;
      });
}

int32_t sk_device_allocate(uint32_t device, uint64_t bytes, uint64_t* address) {
  if (address == nullptr) return sk::fail(SK_STATUS_NULL_POINTER, "address is a null pointer");
  return sk::guarded([&]() -> int32_t {
    void* memory = nullptr;
    SK_TRY(sk::cuda::allocate(device, bytes, &memory));
    *address = reinterpret_cast<uint64_t>(memory);
    return SK_STATUS_OK;
  });
}

int32_t sk_device_free(uint32_t device, uint64_t address) {
  return sk::guarded([&]() -> int32_t {
    sk::cuda::release(device, reinterpret_cast<void*>(address));
    return SK_STATUS_OK;
  });
}

int32_t sk_device_read(uint32_t device, void* to, uint64_t address, uint64_t bytes) {
  SK_TRY(sk::cuda::check_memory(address, to));
  return sk::guarded([&] {
    return sk::cuda::copy_now(device, to, reinterpret_cast<const void*>(address), bytes);
  });
}

int32_t sk_device_write(uint32_t device, uint64_t address, const void* from, uint64_t bytes) {
  SK_TRY(sk::cuda::check_memory(address, from));
  return sk::guarded(
      [&] { return sk::cuda::copy_now(device, reinterpret_cast<void*>(address), from, bytes); });
}
