// What the library calls of NVIDIA's driver, declared by hand: the header cuda.h comes with CUDA's
// toolkit, which an installation need not have.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sk {
namespace cuda {

enum CudaResult : int {
  kCudaOk = 0,
  kCudaOutOfMemory = 2,
  kCudaNotInitialized = 3,
  kCudaNoDevice = 100,
  kCudaNotFound = 500,
};

enum DeviceAttribute : int { kMultiprocessors = 16, kCapabilityMajor = 75, kCapabilityMinor = 76 };

constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureOfThread = 1;  // what other threads do meanwhile is no part of it
constexpr unsigned kOldestDriver = 12000;

using DevicePointer = unsigned long long;

// Member, symbol, parameters. Symbols with _v2 are what cuda.h makes of the plain names.
#define SK_LIBCUDA(X)                                                                            \
  X(init, "cuInit", (unsigned flags))                                                            \
  X(driver_version, "cuDriverGetVersion", (int* version))                                        \
  X(error_name, "cuGetErrorName", (CudaResult error, const char** name))                         \
  X(error_text, "cuGetErrorString", (CudaResult error, const char** text))                       \
  X(device_count, "cuDeviceGetCount", (int* count))                                              \
  X(device, "cuDeviceGet", (int* device, int number))                                            \
  X(device_name, "cuDeviceGetName", (char* name, int bytes, int device))                         \
  X(attribute, "cuDeviceGetAttribute", (int* value, DeviceAttribute attribute, int device))      \
  X(retain_context, "cuDevicePrimaryCtxRetain", (void** context, int device))                    \
  X(push_context, "cuCtxPushCurrent_v2", (void* context))                                        \
  X(pop_context, "cuCtxPopCurrent_v2", (void** context))                                         \
  X(memory_info, "cuMemGetInfo_v2", (size_t* free, size_t* total))                               \
  X(load_module, "cuModuleLoadData", (void** module, const void* image))                         \
  X(function, "cuModuleGetFunction", (void** function, void* module, const char* name))          \
  X(launch, "cuLaunchKernel",                                                                    \
    (void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,        \
     unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, \
     void** extra))                                                                              \
  X(allocate, "cuMemAlloc_v2", (DevicePointer * memory, size_t bytes))                           \
  X(release, "cuMemFree_v2", (DevicePointer memory))                                             \
  X(allocate_pinned, "cuMemHostAlloc", (void** memory, size_t bytes, unsigned flags))            \
  X(release_pinned, "cuMemFreeHost", (void* memory))                                             \
  X(fill, "cuMemsetD8_v2", (DevicePointer memory, unsigned char value, size_t bytes))            \
  X(fill_later, "cuMemsetD8Async",                                                               \
    (DevicePointer memory, unsigned char value, size_t bytes, void* stream))                     \
  X(copy_any, "cuMemcpy", (DevicePointer to, DevicePointer from, size_t bytes))                  \
  X(finish_all, "cuCtxSynchronize", ())                                                          \
  X(create_stream, "cuStreamCreate", (void** stream, unsigned flags))                            \
  X(destroy_stream, "cuStreamDestroy_v2", (void* stream))                                        \
  X(synchronize, "cuStreamSynchronize", (void* stream))                                          \
  X(begin_capture, "cuStreamBeginCapture_v2", (void* stream, int mode))                          \
  X(end_capture, "cuStreamEndCapture", (void* stream, void** graph))                             \
  X(instantiate, "cuGraphInstantiateWithFlags",                                                  \
    (void** executable, void* graph, unsigned long long flags))                                  \
  X(launch_graph, "cuGraphLaunch", (void* executable, void* stream))                             \
  X(release_graph, "cuGraphDestroy", (void* graph))                                              \
  X(release_executable, "cuGraphExecDestroy", (void* executable))                                \
  X(copy_in, "cuMemcpyHtoDAsync_v2",                                                             \
    (DevicePointer to, const void* from, size_t bytes, void* stream))                            \
  X(copy_out, "cuMemcpyDtoHAsync_v2", (void* to, DevicePointer from, size_t bytes, void* stream))

struct LibCuda {
#define SK_MEMBER(member, symbol, parameters) CudaResult(*member) parameters;
  SK_LIBCUDA(SK_MEMBER)
#undef SK_MEMBER
  unsigned version;  // the newest CUDA that the driver knows, 13000 for 13.0
};

// The driver, loaded and started by the first call. SK_STATUS_UNSUPPORTED says why there is none,
// in every call the same.
int32_t find_libcuda(const LibCuda** out);

// After a failure that leaves a GPU of no use to the process.
bool is_sticky(CudaResult error);

}  // namespace cuda
}  // namespace sk
