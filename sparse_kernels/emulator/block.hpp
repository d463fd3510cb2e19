// Blocks of emulated threads, and the memory that they may touch. One launch at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace sk {
namespace emulator {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

// What a kernel did wrong.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Body = void (*)(const void* args);
struct Kernel {
  Body body;
  size_t args_bytes;
};
struct Registration {
  Registration(const char* name, Body body, size_t args_bytes);
};
// Null where there is none of the name.
const Kernel* find_kernel(const std::string& name);

// Runs all blocks of `kernel`, one after another. Throws Fault.
void launch(const Kernel& kernel, const char* name, Dim3 grid, uint32_t threads, const void* args);

// Memory of the device: what kernels read must lie in it. What they write a little beside a piece
// of it is found after the launch.
void* allocate(size_t bytes);  // zeroed, aligned to 256; throws std::bad_alloc
void release(void* memory);
bool is_allocated(const void* at, size_t bytes);

// For kernels.
enum class Access { kOnce, kShared };
void check_access(const void* at, size_t bytes, Access access);
void wait_for_block();
// All 32 lanes of a warp come here with the same `act`, which the last of them calls with what each
// has.
using Act = void (*)(void* const (&all)[32]);
void collective(Act act, void* own);

// What kernels asked for since the last reset, by the name of the kernel.
struct Traffic {
  uint64_t once_bytes, shared_bytes;  // as requested by lanes
  uint64_t once_sectors;              // of 32 bytes, each counted once a block
};
void reset_traffic(bool count_sectors);
Traffic traffic_of(const std::string& name);

}  // namespace emulator
}  // namespace sk
