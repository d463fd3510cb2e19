// driver.hpp by NVIDIA's driver API.
#include <cstring>
#include <mutex>
#include <string>

#include "arguments.hpp"
#include "driver.hpp"
#include "error.hpp"
#include "gpu.hpp"

namespace sk {
namespace cuda {
namespace {

DevicePointer address_of(const void* memory) { return reinterpret_cast<DevicePointer>(memory); }
void* stream_of(uint64_t stream) { return reinterpret_cast<void*>(stream); }

}  // namespace

int32_t device_count(uint32_t* count) {
  *count = 0;
  const LibCuda* cuda;
  // The text stays for sk_last_error().
  if (find_libcuda(&cuda) != SK_STATUS_OK) return SK_STATUS_OK;
  *count = count_gpus(*cuda);
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
