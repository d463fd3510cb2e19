#include "gpu.hpp"

#include <cstdarg>
#include <cstdio>
#include <memory>

#include "error.hpp"

namespace sk {
namespace cuda {
namespace {

struct Gpus {
  std::unique_ptr<Gpu[]> all;
  uint32_t count = 0;
};

// Never destroyed: calls may come at exit.
const Gpus& find_gpus(const LibCuda& cuda) {
  static const Gpus* const gpus = [&] {
    auto* found = new Gpus();
    int count = 0;
    if (cuda.device_count(&count) == kCudaOk) found->count = static_cast<uint32_t>(count);
    found->all.reset(new Gpu[found->count]);
    for (uint32_t i = 0; i < found->count; ++i) found->all[i].number = i;
    return found;
  }();
  return *gpus;
}

}  // namespace

uint32_t count_gpus(const LibCuda& cuda) { return find_gpus(cuda).count; }

Use::~Use() {
  void* ignored;
  if (current_) cuda->pop_context(&ignored);
}

int32_t Use::begin(uint32_t device, bool any) {
  SK_TRY(find_libcuda(&cuda));
  const Gpus& gpus = find_gpus(*cuda);
  if (device >= gpus.count) {
    return sk::fail(SK_STATUS_BAD_VALUE, "device is %" PRIu32 "; the number of GPUs is %" PRIu32,
                    device, gpus.count);
  }
  gpu = &gpus.all[device];
  if (!gpu->open.load(std::memory_order_acquire)) SK_TRY(open());
  if (gpu->broken.load(std::memory_order_acquire)) {
    return sk::fail(SK_STATUS_DEVICE, "%s", gpu->why_broken);
  }
  if (!any && gpu->capability < kOldestCapability) {
    return sk::fail(SK_STATUS_UNSUPPORTED,
                    "GPU %" PRIu32 ", %s, has compute capability %" PRIu32 ".%" PRIu32
                    "; 8.0 is needed",
                    device, gpu->name, gpu->capability / 10, gpu->capability % 10);
  }
  SK_TRY(check(cuda->push_context(gpu->context), "use of its context"));
  current_ = true;
  return SK_STATUS_OK;
}

int32_t Use::check(CudaResult result, const char* format, ...) {
  if (result == kCudaOk) return SK_STATUS_OK;
  char asked[200];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(asked, sizeof(asked), format, arguments);
  va_end(arguments);
  const char *name = "an unknown error", *text = "";
  cuda->error_name(result, &name);
  cuda->error_text(result, &text);
  if (is_sticky(result)) return break_down(asked, name, text);
  const char* hint = result == kCudaNotInitialized
                         ? "; in a process that was forked after the GPU was used it cannot be"
                         : "";
  return sk::fail(result == kCudaOutOfMemory ? SK_STATUS_OUT_OF_MEMORY : SK_STATUS_INTERNAL,
                  "GPU %" PRIu32 ", %s: %s: %s (%s)%s", gpu->number, gpu->name, asked, name, text,
                  hint);
}

int32_t Use::open() {
  const std::lock_guard<std::mutex> lock(gpu->mutex);
  if (gpu->open.load(std::memory_order_relaxed)) return SK_STATUS_OK;
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  SK_TRY(check(cuda->device(&device, static_cast<int>(gpu->number)), "its handle"));
  SK_TRY(check(cuda->device_name(gpu->name, sizeof(gpu->name), device), "its name"));
  SK_TRY(check(cuda->attribute(&major, kCapabilityMajor, device), "its capability"));
  SK_TRY(check(cuda->attribute(&minor, kCapabilityMinor, device), "its capability"));
  SK_TRY(check(cuda->attribute(&multiprocessors, kMultiprocessors, device), "its size"));
  SK_TRY(check(cuda->retain_context(&gpu->context, device), "a context"));
  gpu->capability = static_cast<uint32_t>(10 * major + minor);
  gpu->multiprocessors = static_cast<uint32_t>(multiprocessors);
  gpu->open.store(true, std::memory_order_release);
  return SK_STATUS_OK;
}

int32_t Use::break_down(const char* asked, const char* name, const char* text) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!gpu->broken.load(std::memory_order_relaxed)) {
    std::snprintf(gpu->why_broken, sizeof(gpu->why_broken),
                  "GPU %" PRIu32
                  ", %s, failed: %s: %s (%s). An earlier launch may be the cause "
                  "(CUDA_LAUNCH_BLOCKING=1 finds it); this process can no longer use the GPU, a "
                  "new one can",
                  gpu->number, gpu->name, asked, name, text);
    gpu->broken.store(true, std::memory_order_release);
  }
  return sk::fail(SK_STATUS_DEVICE, "%s", gpu->why_broken);
}

}  // namespace cuda
}  // namespace sk
