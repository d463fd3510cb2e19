// The code of a GPU, and its kernels.
#include <string_view>

#include "error.hpp"
#include "gpu.hpp"
#include "image.hpp"

namespace sk {
namespace cuda {
namespace {

// Why a GPU and its driver cannot have some code, and what to do; null for other failures.
const char* why_no_image(CudaResult result) {
  switch (static_cast<int>(result)) {
    case 218:  // INVALID_PTX
    case 221:  // JIT_COMPILER_NOT_FOUND
    case 222:  // UNSUPPORTED_PTX_VERSION
    case 223:  // JIT_COMPILATION_DISABLED
      return "there is no machine code for it and the driver cannot compile what there is; install "
             "a newer driver, or sparserve again where nvcc is not newer than the driver";
    case 200:  // INVALID_IMAGE
    case 209:  // NO_BINARY_FOR_GPU
      return "the code is for other GPUs or is damaged; install sparserve again, with this GPU in "
             "SPARSE_KERNELS_CUDA_ARCHITECTURES";
    default:
      return nullptr;
  }
}

}  // namespace

int32_t load_module(Use& use, const void* image, const char* compiled_by) {
  void* code = nullptr;
  const CudaResult result = use.cuda->load_module(&code, image);
  const unsigned known = use.cuda->version;
  const char* of_cuda = *compiled_by == 0 ? "" : " compiled by CUDA ";
  if (const char* why = why_no_image(result)) {
    const char* name = "an unknown error";
    use.cuda->error_name(result, &name);
    return fail(SK_STATUS_UNSUPPORTED,
                "GPU %" PRIu32 ", %s, of compute capability %" PRIu32 ".%" PRIu32
                ", whose driver knows CUDA %u.%u, takes no kernels%s%s (%s): %s",
                use.gpu->number, use.gpu->name, use.gpu->capability / 10, use.gpu->capability % 10,
                known / 1000, known % 1000 / 10, of_cuda, compiled_by, name, why);
  }
  SK_TRY(use.check(result, "its driver knows CUDA %u.%u; loading kernels%s%s", known / 1000,
                   known % 1000 / 10, of_cuda, compiled_by));
  // An earlier module stays: its kernels may run.
  use.gpu->code = code;
  use.gpu->kernels.clear();
  return SK_STATUS_OK;
}

int32_t need_code(Use& use) {
  Gpu& gpu = *use.gpu;
  if (gpu.code != nullptr) return SK_STATUS_OK;
  if (gpu.why_no_code.empty()) {
    if (embedded_image == nullptr) {
      gpu.why_no_code = "the library was built without nvcc";
    } else {
      const int32_t status = load_module(use, embedded_image, embedded_image_cuda);
      if (status == SK_STATUS_OK || status == SK_STATUS_DEVICE) return status;
      gpu.why_no_code = sk_last_error();
    }
  }
  return sk::fail(SK_STATUS_UNSUPPORTED,
                  "GPU %" PRIu32
                  ", %s, has no kernels: %s. Install again with nvcc 12 or newer on "
                  "the PATH, or install sparserve[cuda], which compiles them at first use",
                  gpu.number, gpu.name, gpu.why_no_code.c_str());
}

int32_t find_kernel(Use& use, const char* name, void** kernel) {
  Gpu& gpu = *use.gpu;
  const std::lock_guard<std::mutex> lock(gpu.mutex);
  const auto found = gpu.kernels.find(std::string_view(name));
  if (found != gpu.kernels.end()) {
    *kernel = found->second;
    return SK_STATUS_OK;
  }
  SK_TRY(need_code(use));
  SK_TRY(use.check(use.cuda->function(kernel, gpu.code, name), "kernel %s", name));
  gpu.kernels.emplace(name, *kernel);
  return SK_STATUS_OK;
}

}  // namespace cuda
}  // namespace sk
