// NVIDIA's GPUs of the process: their contexts, their code, and what left them broken.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>

#include "libcuda.hpp"

namespace sk {
namespace cuda {

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

// How many there are.
uint32_t count_gpus(const LibCuda& cuda);

// A GPU whose context is this thread's while it lives; the thread's own comes back.
class Use {
 public:
  Use() = default;
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  ~Use();

  // With `any` also a GPU that is too old for the kernels.
  int32_t begin(uint32_t device, bool any = false);

  // `format` says what was asked for.
  __attribute__((format(printf, 3, 4))) int32_t check(CudaResult result, const char* format, ...);

  const LibCuda* cuda = nullptr;
  Gpu* gpu = nullptr;

 private:
  int32_t open();
  int32_t break_down(const char* asked, const char* name, const char* text);

  bool current_ = false;
};

// The library's own code, unless it was given other. The GPU's mutex is held.
int32_t need_code(Use& use);
// Code in place of what it has, which `compiled_by`, a version of CUDA or "", made. The GPU's mutex
// is held.
int32_t load_module(Use& use, const void* image, const char* compiled_by);
int32_t find_kernel(Use& use, const char* name, void** kernel);

}  // namespace cuda
}  // namespace sk
