// Keeps C++ exceptions inside the library.
#pragma once

#include <exception>
#include <new>
#include <system_error>

#include "error.hpp"

namespace sk {

// Calls `body`, which returns a status.
template <typename Body>
int32_t guarded(Body&& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(SK_STATUS_OUT_OF_MEMORY, "out of memory");
  } catch (const std::system_error& error) {
    return fail(SK_STATUS_OUT_OF_MEMORY, "cannot start threads: %s", error.what());
  } catch (const std::exception& error) {
    return fail(SK_STATUS_INTERNAL, "%s", error.what());
  }
}

}  // namespace sk
