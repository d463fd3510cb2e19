#include "libcuda.hpp"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>

#include "error.hpp"

namespace sk {
namespace cuda {
namespace {

struct Found {
  LibCuda functions = {};
  bool usable = false;
  char text[400] = "";  // why not

  Found() { usable = load() && start(); }

 private:
  __attribute__((format(printf, 2, 3))) bool refuse(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    return false;
  }

  bool load() {
    // Never closed: its threads outlive any use of it.
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      return refuse("no NVIDIA driver: libcuda.so.1 cannot be loaded (%s)", dlerror());
    }
#define SK_LOAD(member, symbol, parameters)                                              \
  functions.member = reinterpret_cast<CudaResult(*) parameters>(dlsym(library, symbol)); \
  if (functions.member == nullptr) {                                                     \
    return refuse(                                                                       \
        "the NVIDIA driver is too old: libcuda.so.1 has no %s; install one that "        \
        "knows CUDA 12.0 (525 or newer)",                                                \
        symbol);                                                                         \
  }
    SK_LIBCUDA(SK_LOAD)
#undef SK_LOAD
    return true;
  }

  bool start() {
    int version = 0;
    if (functions.driver_version(&version) == kCudaOk) {
      functions.version = static_cast<unsigned>(version);
    }
    if (functions.version < kOldestDriver) {
      return refuse(
          "the NVIDIA driver knows CUDA %u.%u; 12.0 is needed: install driver 525 or "
          "newer",
          functions.version / 1000, functions.version % 1000 / 10);
    }
    const CudaResult result = functions.init(0);
    if (result == kCudaOk) return true;
    const char *name = "unknown", *why = "unknown";
    functions.error_name(result, &name);
    functions.error_text(result, &why);
    if (result == kCudaNoDevice) {
      return refuse("no GPU: the NVIDIA driver finds none (%s); CUDA_VISIBLE_DEVICES hides some",
                    name);
    }
    return refuse("the NVIDIA driver does not start: %s (%s)", name, why);
  }
};

}  // namespace

int32_t find_libcuda(const LibCuda** out) {
  static const Found* const found = new Found();  // never destroyed: calls may come at exit
  if (!found->usable) return fail(SK_STATUS_UNSUPPORTED, "%s", found->text);
  *out = &found->functions;
  return SK_STATUS_OK;
}

bool is_sticky(CudaResult error) {
  switch (static_cast<int>(error)) {
    case 4:    // DEINITIALIZED
    case 214:  // ECC_UNCORRECTABLE
    case 220:  // NVLINK_UNCORRECTABLE
    case 226:  // CONTAINED
    case 700:  // ILLEGAL_ADDRESS
    case 702:  // LAUNCH_TIMEOUT
    case 709:  // CONTEXT_IS_DESTROYED
    case 710:  // ASSERT
    case 714:  // HARDWARE_STACK_ERROR
    case 715:  // ILLEGAL_INSTRUCTION
    case 716:  // MISALIGNED_ADDRESS
    case 717:  // INVALID_ADDRESS_SPACE
    case 718:  // INVALID_PC
    case 719:  // LAUNCH_FAILED
    case 721:  // TENSOR_MEMORY_LEAK
    case 810:  // MPS_CLIENT_TERMINATED
    case 999:  // UNKNOWN
      return true;
    default:
      return false;
  }
}

}  // namespace cuda
}  // namespace sk
