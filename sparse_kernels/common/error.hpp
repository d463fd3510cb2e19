// Failures cross the C ABI as a status and a text kept per thread.
#pragma once

#include <cinttypes>
#include <cstdint>

#include "sparse_kernels.h"

// Runs check after check until one fails.
#define SK_TRY(expression)                                  \
  do {                                                      \
    if (const int32_t failed = (expression)) return failed; \
  } while (false)

namespace sk {

// Keeps the text for sk_last_error() and returns `status`, so that `return fail(...)` is enough.
__attribute__((format(printf, 2, 3))) int32_t fail(sk_status status, const char* format, ...);

// Refuses a null pointer or a struct of another header. Reads no more than the first 8 bytes: a
// caller with an older header may own no more than those.
template <typename Struct>
int32_t check_struct(const Struct* value, const char* name) {
  if (value == nullptr) return fail(SK_STATUS_NULL_POINTER, "%s is a null pointer", name);
  if (value->abi_version != SK_ABI_VERSION) {
    return fail(SK_STATUS_ABI_MISMATCH, "%s has abi_version %" PRIu32 ", this library has %d", name,
                value->abi_version, SK_ABI_VERSION);
  }
  if (value->struct_size != sizeof(Struct)) {
    return fail(SK_STATUS_ABI_MISMATCH, "%s has struct_size %" PRIu32 ", this library has %zu",
                name, value->struct_size, sizeof(Struct));
  }
  return SK_STATUS_OK;
}

}  // namespace sk
