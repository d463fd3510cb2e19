// driver.hpp by the emulator: one device, whose memory is the host's and whose launches are over
// when they return. Beside the ABI the library has functions for tests, sk_emulator_.
#include "../cuda/driver.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/arguments.hpp"
#include "block.hpp"
#include "error.hpp"

namespace sk {
namespace cuda {
namespace {

constexpr char kName[] = "emulator";
constexpr uint64_t kStream = 1;
constexpr uint32_t kMostBlocks = 65535;  // in y and z, as CUDA has it

// Of the device, and of the emulator, which runs one launch at a time.
std::mutex mutex;
size_t limit = size_t{16} << 30;
size_t used = 0;
uint64_t bytes_out = 0;            // that copy_out copied
uint64_t launches_to_failure = 0;  // 0: none fails by order
std::string broken;                // why, or ""

struct Launch {
  const emulator::Kernel* kernel;
  std::string name;
  emulator::Dim3 blocks;
  std::vector<uint8_t> args;
};
using Graph = std::vector<Launch>;
thread_local Graph* capturing = nullptr;
enum class OfGraph : uint32_t { kNone, kBegin, kEnd, kLaunch };
OfGraph graph_failure = OfGraph::kNone;  // what fails once, by order

std::map<void*, size_t>& sizes() {
  static auto* all = new std::map<void*, size_t>();
  return *all;
}

int32_t begin(uint32_t device) {
  if (device != 0) {
    return fail(SK_STATUS_BAD_VALUE, "device is %" PRIu32 "; there is 1 GPU", device);
  }
  if (!broken.empty()) return fail(SK_STATUS_DEVICE, "%s", broken.c_str());
  return SK_STATUS_OK;
}

int32_t break_down(const std::string& why) {
  broken = std::string("GPU 0, ") + kName + ", failed: " + why;
  return fail(SK_STATUS_DEVICE, "%s", broken.c_str());
}

// Of what would end a capture.
int32_t check_no_capture(const char* what) {
  if (capturing == nullptr) return SK_STATUS_OK;
  return fail(SK_STATUS_INTERNAL, "%s while a graph is captured, which can hold launches alone",
              what);
}

int32_t check_copy(uint32_t device, const void* memory, size_t bytes) {
  SK_TRY(begin(device));
  SK_TRY(check_no_capture("a copy"));
  if (bytes == 0 || emulator::is_allocated(memory, bytes)) return SK_STATUS_OK;
  return break_down("a copy of " + std::to_string(bytes) + " bytes leaves its memory");
}

int32_t check_graph(OfGraph what, const char* name) {
  if (graph_failure != what) return SK_STATUS_OK;
  graph_failure = OfGraph::kNone;
  return fail(SK_STATUS_INTERNAL, "GPU 0, %s: %s: fails as a test asked for", kName, name);
}

int32_t check_launch(const char* name, const emulator::Kernel* kernel, Grid grid, size_t bytes) {
  if (kernel == nullptr) return fail(SK_STATUS_INTERNAL, "there is no kernel %s", name);
  if (kernel->args_bytes != bytes) {
    return fail(SK_STATUS_INTERNAL, "launch of %s with %zu bytes of arguments; it takes %zu", name,
                bytes, kernel->args_bytes);
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > kMostBlocks ||
      grid.z > kMostBlocks) {
    return fail(SK_STATUS_INTERNAL,
                "launch of %s, %" PRIu32 " x %" PRIu32 " x %" PRIu32
                " blocks; each can be 1 to %" PRIu32 ", the first to %" PRId32,
                name, grid.x, grid.y, grid.z, kMostBlocks, INT32_MAX);
  }
  return SK_STATUS_OK;
}

int32_t compute(const Launch& one) {
  if (launches_to_failure != 0 && --launches_to_failure == 0) {
    return break_down(one.name + ": fails as a test asked for");
  }
  try {
    emulator::launch(*one.kernel, one.name.c_str(), one.blocks, kThreads, one.args.data());
  } catch (const emulator::Fault& fault) {
    return break_down(fault.what());
  }
  return SK_STATUS_OK;
}

}  // namespace

int32_t device_count(uint32_t* count) {
  *count = 1;
  return SK_STATUS_OK;
}

int32_t describe_device(uint32_t device, sk_device_info* info) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  info->total_bytes = limit;
  info->free_bytes = limit > used ? limit - used : 0;
  info->capability = 90;
  info->multiprocessors = 1;
  info->driver = 13000;
  info->coded = 1;
  std::memset(info->name, 0, sizeof(info->name));
  std::memcpy(info->name, kName, sizeof(kName));
  return SK_STATUS_OK;
}

int32_t load_code(uint32_t device, const void*, size_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  return fail(SK_STATUS_UNSUPPORTED, "GPU 0, %s, runs no other kernels than its own", kName);
}

int32_t allocate(uint32_t device, size_t bytes, void** memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  SK_TRY(check_no_capture("an allocation"));
  const size_t free = limit > used ? limit - used : 0;
  if (bytes > free) {
    return fail(SK_STATUS_OUT_OF_MEMORY,
                "GPU 0, %s: %zu bytes of its memory are wanted, %zu of %zu are free", kName, bytes,
                free, limit);
  }
  *memory = emulator::allocate(bytes);
  sizes()[*memory] = bytes;
  used += bytes;
  return SK_STATUS_OK;
}

void release(uint32_t, void* memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = sizes().find(memory);
  if (found == sizes().end()) return;
  used -= found->second;
  sizes().erase(found);
  emulator::release(memory);
}

int32_t allocate_pinned(uint32_t device, size_t bytes, void** memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  *memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (*memory == nullptr) throw std::bad_alloc();
  return SK_STATUS_OK;
}

void release_pinned(uint32_t, void* memory) { std::free(memory); }

int32_t begin_stream(uint32_t device, uint64_t* stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  if (*stream == 0) *stream = kStream;
  return SK_STATUS_OK;
}

void end_stream(uint32_t, uint64_t) {}

int32_t copy_in(uint32_t device, uint64_t, void* to, const void* from, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(check_copy(device, to, bytes));
  if (bytes != 0) std::memcpy(to, from, bytes);
  return SK_STATUS_OK;
}

int32_t copy_out(uint32_t device, uint64_t, void* to, const void* from, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(check_copy(device, from, bytes));
  if (bytes != 0) std::memcpy(to, from, bytes);
  bytes_out += bytes;
  return SK_STATUS_OK;
}

int32_t copy_now(uint32_t device, void* to, const void* from, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(check_copy(device, emulator::is_allocated(to, bytes) ? to : from, bytes));
  if (bytes != 0) std::memcpy(to, from, bytes);
  return SK_STATUS_OK;
}

int32_t launch(uint32_t device, uint64_t, const char* name, Grid grid, const void* args,
               size_t args_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  const emulator::Kernel* kernel = emulator::find_kernel(name);
  SK_TRY(check_launch(name, kernel, grid, args_bytes));
  const auto* bytes = static_cast<const uint8_t*>(args);
  Launch one = {kernel, name, {}, {bytes, bytes + args_bytes}};
  one.blocks.x = grid.x;
  one.blocks.y = grid.y;
  one.blocks.z = grid.z;
  if (capturing == nullptr) return compute(one);
  capturing->push_back(std::move(one));
  return SK_STATUS_OK;
}

int32_t begin_capture(uint32_t device, uint64_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  SK_TRY(check_no_capture("a capture"));
  SK_TRY(check_graph(OfGraph::kBegin, "capturing a graph"));
  capturing = new Graph();
  return SK_STATUS_OK;
}

int32_t end_capture(uint32_t device, uint64_t, void** graph) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<Graph> captured(std::exchange(capturing, nullptr));
  SK_TRY(begin(device));
  if (captured == nullptr) return fail(SK_STATUS_INTERNAL, "no capture was begun");
  SK_TRY(check_graph(OfGraph::kEnd, "making a graph"));
  if (graph != nullptr) *graph = captured.release();
  return SK_STATUS_OK;
}

int32_t launch_graph(uint32_t device, uint64_t, void* graph) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(begin(device));
  SK_TRY(check_graph(OfGraph::kLaunch, "launch of a graph"));
  for (const Launch& one : *static_cast<const Graph*>(graph)) SK_TRY(compute(one));
  return SK_STATUS_OK;
}

void release_graph(uint32_t, void* graph) { delete static_cast<Graph*>(graph); }

int32_t clear(uint32_t device, uint64_t, void* memory, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(check_copy(device, memory, bytes));
  if (bytes != 0) std::memset(memory, 0, bytes);
  return SK_STATUS_OK;
}

int32_t wait(uint32_t device, uint64_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  SK_TRY(check_no_capture("waiting"));
  return begin(device);
}

}  // namespace cuda
}  // namespace sk

extern "C" {

// A device that failed works again; nothing fails by order.
SK_API void sk_emulator_reset(void) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  sk::cuda::broken.clear();
  sk::cuda::launches_to_failure = 0;
  sk::cuda::graph_failure = sk::cuda::OfGraph::kNone;
}

// From now on; what is allocated stays.
SK_API void sk_emulator_limit_memory(uint64_t bytes) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  sk::cuda::limit = bytes;
}

// The number-th launch from now on breaks the device; 1: the next.
SK_API void sk_emulator_fail_launch(uint64_t number) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  sk::cuda::launches_to_failure = number;
}

// The next begin (1) or end (2) of a capture, or launch of a graph (3) is refused; the device works
// on.
SK_API void sk_emulator_fail_graph(uint32_t what) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  sk::cuda::graph_failure = static_cast<sk::cuda::OfGraph>(what);
}

// That forwards copied to the host so far.
SK_API uint64_t sk_emulator_bytes_out(void) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  return sk::cuda::bytes_out;
}

// Counts anew; sectors only where asked for, they take time.
SK_API void sk_emulator_reset_traffic(int32_t count_sectors) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  sk::emulator::reset_traffic(count_sectors != 0);
}

// Of all launches of a kernel: bytes that lanes asked for by read_once and by read_shared, and
// sectors of 32 bytes of read_once.
SK_API int32_t sk_emulator_traffic(const char* kernel, uint64_t out[3]) {
  const std::lock_guard<std::mutex> lock(sk::cuda::mutex);
  if (sk::emulator::find_kernel(kernel) == nullptr) {
    return sk::fail(SK_STATUS_BAD_VALUE, "there is no kernel %s", kernel);
  }
  const sk::emulator::Traffic traffic = sk::emulator::traffic_of(kernel);
  out[0] = traffic.once_bytes;
  out[1] = traffic.shared_bytes;
  out[2] = traffic.once_sectors;
  return SK_STATUS_OK;
}
}
