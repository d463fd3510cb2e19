#include "error.hpp"

#include <cstdarg>
#include <cstdio>

namespace sk {
namespace {

// A plain array: a failure to allocate can be reported too.
thread_local char last_error[512] = "";

}  // namespace

int32_t fail(sk_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace sk

uint32_t sk_abi_version(void) { return SK_ABI_VERSION; }

const char* sk_last_error(void) { return sk::last_error; }
