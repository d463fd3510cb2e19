// Reads memory as fast as one core can. Included by sources with instruction-set flags, so it must
// stay free of inline code (CMakeLists.txt says why).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace sk {

// The sum, modulo 2^64, of the `bytes / 8` words at `data`. The sum keeps the compiler from
// dropping the loads, and lets the caller prove that each word was read.
// `data` is aligned to 64 bytes; `bytes` is a multiple of 4096.
using ReadSum = uint64_t (*)(const void* data, size_t bytes);

uint64_t read_sum_portable(const void* data, size_t bytes);
uint64_t read_sum_avx2(const void* data, size_t bytes);
uint64_t read_sum_avx512(const void* data, size_t bytes);

}  // namespace sk
