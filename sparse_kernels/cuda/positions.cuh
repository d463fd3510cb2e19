// Which positions a token sees.
#pragma once

#include "rounding.cuh"

namespace sk {
namespace cuda {

__device__ inline uint32_t first_seen(uint32_t position, uint32_t window) {
  return window != 0 && position + 1 > window ? position + 1 - window : 0;
}

// The chunks that they lie in.
__device__ inline uint32_t chunks_of(uint32_t position, uint32_t window) {
  return position / kChunk - first_seen(position, window) / kChunk + 1;
}

}  // namespace cuda
}  // namespace sk
