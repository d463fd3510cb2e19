// driver.hpp by NVIDIA's driver API.
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "arguments.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "image.hpp"
#include "libcuda.hpp"

namespace sk {
namespace cuda {
namespace {

constexpr uint32_t kOldestCapability = 80;

struct Gpu {
  uint32_t number = 0;
  std::atomic<bool> open{false};
  void* context = nullptr;  // the primary one, which others in the process share; never let go
  uint32_t capability = 0, multiprocessors = 0;
  char name[64] = "";

  // Set once, by what left it broken.
  std::atomic<bool> broken{false};
  char why_broken[640] = "";

  std::mutex mutex;  // of opening, breaking and of what follows
  void* code = nullptr;
  std::string why_no_code;  // of the library's own image; "" before it was tried
  std::map<std::string, void*, std::less<>> kernels;

  // Held while a stream captures: nothing may wait for the whole GPU meanwhile.
  std::mutex capturing;
};

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

// A GPU whose context is this thread's while it lives; the thread's own comes back.
class Use {
 public:
  Use() = default;
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  ~Use() {
    void* ignored;
    if (current_) cuda->pop_context(&ignored);
  }

  // With `any` also a GPU that is too old for the kernels.
  int32_t begin(uint32_t device, bool any = false) {
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

  // `format` says what was asked for.
  __attribute__((format(printf, 3, 4))) int32_t check(CudaResult result, const char* format, ...) {
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

  const LibCuda* cuda = nullptr;
  Gpu* gpu = nullptr;

 private:
  int32_t open() {
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

  int32_t break_down(const char* asked, const char* name, const char* text) {
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

  bool current_ = false;
};

DevicePointer address_of(const void* memory) { return reinterpret_cast<DevicePointer>(memory); }
void* stream_of(uint64_t stream) { return reinterpret_cast<void*>(stream); }

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

// The library's own code, unless it was given other. The GPU's mutex is held.
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

}  // namespace

int32_t device_count(uint32_t* count) {
  *count = 0;
  const LibCuda* cuda;
  // The text stays for sk_last_error().
  if (find_libcuda(&cuda) != SK_STATUS_OK) return SK_STATUS_OK;
  *count = find_gpus(*cuda).count;
  if (*count == 0) fail(SK_STATUS_UNSUPPORTED, "no GPU: the NVIDIA driver finds none");
  return SK_STATUS_OK;
}

int32_t describe_device(uint32_t device, sk_device_info* info) {
  Use use;
  SK_TRY(use.begin(device, true));
  size_t free = 0, total = 0;
  SK_TRY(use.check(use.cuda->memory_info(&free, &total), "its memory"));
  const std::lock_guard<std::mutex> lock(use.gpu->mutex);
  info->total_bytes = total;
  info->free_bytes = free;
  info->capability = use.gpu->capability;
  info->multiprocessors = use.gpu->multiprocessors;
  info->driver = use.cuda->version;
  info->coded = use.gpu->capability >= kOldestCapability && need_code(use) == SK_STATUS_OK;
  static_assert(sizeof(info->name) == sizeof(use.gpu->name));
  std::memcpy(info->name, use.gpu->name, sizeof(info->name));
  return SK_STATUS_OK;
}

int32_t load_code(uint32_t device, const void* image, size_t bytes) {
  Use use;
  SK_TRY(use.begin(device));
  const std::string ended(static_cast<const char*>(image), bytes);  // as PTX must be
  const std::lock_guard<std::mutex> lock(use.gpu->mutex);
  return load_module(use, ended.c_str(), "");
}

int32_t allocate(uint32_t device, size_t bytes, void** memory) {
  Use use;
  SK_TRY(use.begin(device));
  DevicePointer address = 0;
  const size_t wanted = bytes == 0 ? 1 : bytes;
  const CudaResult result = use.cuda->allocate(&address, wanted);
  if (result != kCudaOk) {
    size_t free = 0, total = 0;
    use.cuda->memory_info(&free, &total);
    return use.check(result, "%zu bytes of its memory are wanted, %zu of %zu are free", wanted,
                     free, total);
  }
  const std::lock_guard<std::mutex> lock(use.gpu->capturing);
  // The fill is of the default stream, which streams of their own do not wait for.
  CudaResult filled = use.cuda->fill(address, 0, wanted);
  if (filled == kCudaOk) filled = use.cuda->synchronize(nullptr);
  if (filled != kCudaOk) {
    use.cuda->release(address);
    return use.check(filled, "filling %zu bytes of its memory", wanted);
  }
  *memory = reinterpret_cast<void*>(address);
  return SK_STATUS_OK;
}

void release(uint32_t device, void* memory) {
  Use use;
  if (use.begin(device) == SK_STATUS_OK) {
    use.check(use.cuda->release(address_of(memory)), "freeing memory");
  }
}

int32_t allocate_pinned(uint32_t device, size_t bytes, void** memory) {
  Use use;
  SK_TRY(use.begin(device));
  return use.check(use.cuda->allocate_pinned(memory, bytes == 0 ? 1 : bytes, 0),
                   "%zu bytes of pinned host memory are wanted (ulimit -l may limit them)", bytes);
}

void release_pinned(uint32_t device, void* memory) {
  Use use;
  if (use.begin(device) == SK_STATUS_OK) {
    use.check(use.cuda->release_pinned(memory), "freeing pinned memory");
  }
}

int32_t begin_stream(uint32_t device, uint64_t* stream) {
  Use use;
  SK_TRY(use.begin(device));
  if (*stream != 0) return SK_STATUS_OK;
  void* made = nullptr;
  SK_TRY(use.check(use.cuda->create_stream(&made, kStreamNonBlocking), "a stream"));
  *stream = reinterpret_cast<uint64_t>(made);
  return SK_STATUS_OK;
}

void end_stream(uint32_t device, uint64_t stream) {
  Use use;
  if (use.begin(device) == SK_STATUS_OK) {
    use.check(use.cuda->destroy_stream(stream_of(stream)), "ending a stream");
  }
}

int32_t copy_in(uint32_t device, uint64_t stream, void* to, const void* from, size_t bytes) {
  Use use;
  SK_TRY(use.begin(device));
  return use.check(use.cuda->copy_in(address_of(to), from, bytes, stream_of(stream)),
                   "copying %zu bytes to it", bytes);
}

int32_t copy_out(uint32_t device, uint64_t stream, void* to, const void* from, size_t bytes) {
  Use use;
  SK_TRY(use.begin(device));
  return use.check(use.cuda->copy_out(to, address_of(from), bytes, stream_of(stream)),
                   "copying %zu bytes from it", bytes);
}

int32_t copy_now(uint32_t device, void* to, const void* from, size_t bytes) {
  Use use;
  SK_TRY(use.begin(device));
  const std::lock_guard<std::mutex> lock(use.gpu->capturing);
  SK_TRY(use.check(use.cuda->finish_all(), "waiting for its work"));
  return use.check(use.cuda->copy_any(address_of(to), address_of(from), bytes), "copying %zu bytes",
                   bytes);
}

int32_t launch(uint32_t device, uint64_t stream, const char* kernel, Grid grid, const void* args,
               size_t args_bytes) {
  Use use;
  SK_TRY(use.begin(device));
  void* function = nullptr;
  SK_TRY(find_kernel(use, kernel, &function));
  // CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE, _END: unlike a list of parameters, this tells the
  // driver how many bytes there are.
  void* extra[] = {reinterpret_cast<void*>(1), const_cast<void*>(args), reinterpret_cast<void*>(2),
                   &args_bytes, nullptr};
  return use.check(use.cuda->launch(function, grid.x, grid.y, grid.z, kThreads, 1, 1, 0,
                                    stream_of(stream), nullptr, extra),
                   "launch of %s, %" PRIu32 " x %" PRIu32 " x %" PRIu32 " blocks", kernel, grid.x,
                   grid.y, grid.z);
}

int32_t begin_capture(uint32_t device, uint64_t stream) {
  Use use;
  SK_TRY(use.begin(device));
  use.gpu->capturing.lock();
  const int32_t status =
      use.check(use.cuda->begin_capture(stream_of(stream), kCaptureOfThread), "capturing a graph");
  if (status != SK_STATUS_OK) use.gpu->capturing.unlock();
  return status;
}

int32_t end_capture(uint32_t device, uint64_t stream, void** graph) {
  Use use;
  const int32_t begun = use.begin(device);
  if (use.gpu == nullptr) return begun;
  const std::lock_guard<std::mutex> lock(use.gpu->capturing, std::adopt_lock);
  SK_TRY(begun);
  void *captured = nullptr, *executable = nullptr;
  SK_TRY(use.check(use.cuda->end_capture(stream_of(stream), &captured), "ending a capture"));
  int32_t status = SK_STATUS_OK;
  if (graph != nullptr) {
    status = use.check(use.cuda->instantiate(&executable, captured, 0), "making a graph");
  }
  use.cuda->release_graph(captured);
  if (status == SK_STATUS_OK && graph != nullptr) *graph = executable;
  return status;
}

int32_t launch_graph(uint32_t device, uint64_t stream, void* graph) {
  Use use;
  SK_TRY(use.begin(device));
  return use.check(use.cuda->launch_graph(graph, stream_of(stream)), "launch of a graph");
}

void release_graph(uint32_t device, void* graph) {
  Use use;
  if (use.begin(device) == SK_STATUS_OK) {
    use.check(use.cuda->release_executable(graph), "freeing a graph");
  }
}

int32_t clear(uint32_t device, uint64_t stream, void* memory, size_t bytes) {
  Use use;
  SK_TRY(use.begin(device));
  return use.check(use.cuda->fill_later(address_of(memory), 0, bytes, stream_of(stream)),
                   "clearing %zu bytes of its memory", bytes);
}

int32_t wait(uint32_t device, uint64_t stream) {
  Use use;
  SK_TRY(use.begin(device));
  return use.check(use.cuda->synchronize(stream_of(stream)), "waiting for its stream");
}

}  // namespace cuda
}  // namespace sk
