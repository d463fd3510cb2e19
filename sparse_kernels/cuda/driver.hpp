// What the library needs of a GPU: memory, copies, launches. Two sources define these functions:
// one calls NVIDIA's driver, which it loads when it is first asked (driver_nvidia.cpp), one the
// emulator (emulator/driver.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparse_kernels.h"

namespace sk {
namespace cuda {

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

// Every function below returns SK_STATUS_OK or a failure that it noted, see error.hpp. After
// SK_STATUS_DEVICE all calls for the device fail.

int32_t device_count(uint32_t* count);
int32_t describe_device(uint32_t device, sk_device_info* info);
int32_t load_code(uint32_t device, const void* image, size_t bytes);

// Device memory, zeroed. SK_STATUS_OUT_OF_MEMORY tells what was wanted and what is free.
int32_t allocate(uint32_t device, size_t bytes, void** memory);
void release(uint32_t device, void* memory);
// Host memory that copies run from and to at full speed.
int32_t allocate_pinned(uint32_t device, size_t bytes, void** memory);
void release_pinned(uint32_t device, void* memory);

// 0 in, a stream of its own out, which is ended by end_stream; another stays what it is.
int32_t begin_stream(uint32_t device, uint64_t* stream);
void end_stream(uint32_t device, uint64_t stream);
// In the order of a stream, from and to pinned memory.
int32_t copy_in(uint32_t device, uint64_t stream, void* to, const void* from, size_t bytes);
int32_t copy_out(uint32_t device, uint64_t stream, void* to, const void* from, size_t bytes);
// Between device and any host memory, whichever is which, after all work of the device.
int32_t copy_now(uint32_t device, void* to, const void* from, size_t bytes);
int32_t launch(uint32_t device, uint64_t stream, const char* kernel, Grid grid, const void* args,
               size_t args_bytes);
// What this thread launches on a stream between these two is not computed but kept, as a graph that
// launches it all. end_capture ends the capture whatever fails; null as `graph`: it keeps nothing.
int32_t begin_capture(uint32_t device, uint64_t stream);
int32_t end_capture(uint32_t device, uint64_t stream, void** graph);
// Where it fails but for SK_STATUS_DEVICE, nothing of it is computed.
int32_t launch_graph(uint32_t device, uint64_t stream, void* graph);
void release_graph(uint32_t device, void* graph);
int32_t clear(uint32_t device, uint64_t stream, void* memory, size_t bytes);
int32_t wait(uint32_t device, uint64_t stream);

}  // namespace cuda
}  // namespace sk
