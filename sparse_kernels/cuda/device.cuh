// What kernels are written with. Under nvcc and NVRTC it is CUDA's own, as short as can be; under
// g++ the emulator defines the same names (emulator/device.hpp), so that the same kernels run in
// its tests. No header of the host is included: NVRTC has none.
//
// - SK_KERNEL(name, Args): a kernel `name` that is given a struct Args by value, `args`. Two of its
//   blocks fit on a multiprocessor, so a thread has 128 registers; SK_LARGE_KERNEL: one, and 255.
// - threadIdx, blockIdx, gridDim, __shared__ (static sizes alone), __device__ as in CUDA.
// - All lanes of a warp reach shuffle_xor, ballot, sync_warp, mma_* together; all threads of a
// block
//   reach sync_threads.
// - Weights are read once: read_once. Whatever else other threads read too: read_shared. Both want
//   addresses that are aligned to what is read.
#pragma once

#if defined(SPARSE_KERNELS_EMULATOR)
#include "device.hpp"
#else

#if defined(__CUDACC_RTC__)
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <stdint.h>
#endif

#define SK_KERNEL(name, Args) \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) name(const Args args)
#define SK_LARGE_KERNEL(name, Args) \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) name(const Args args)

namespace sk {
namespace cuda {

template <typename T>
__device__ inline T read_shared(const T* at) {
  return __ldg(at);
}
__device__ inline uint32_t read_once(const uint32_t* at) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at));
  return v;
}
__device__ inline uint2 read_once(const uint2* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(at));
  return v;
}
__device__ inline uint4 read_once(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

__device__ inline void sync_threads() { __syncthreads(); }
__device__ inline void sync_warp() { __syncwarp(); }
__device__ inline float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
__device__ inline int32_t shuffle_xor(int32_t v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
__device__ inline uint32_t shuffle_xor(uint32_t v, int mask) {
  return __shfl_xor_sync(~0u, v, mask);
}
__device__ inline uint32_t ballot(bool v) { return __ballot_sync(~0u, v); }
__device__ inline uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
__device__ inline int32_t count_bits(uint32_t v) { return __popc(v); }
__device__ inline float float_of_bits(uint32_t v) { return __uint_as_float(v); }
__device__ inline uint32_t bits_of_float(float v) { return __float_as_uint(v); }
__device__ inline float float_of_half(uint16_t v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
// As accurate as they are without fast-math.
__device__ inline float square_root(float v) { return sqrtf(v); }
__device__ inline float exponential(float v) { return expf(v); }
__device__ inline float cosine(float v) { return cosf(v); }
__device__ inline float sine(float v) { return sinf(v); }
__device__ inline double logarithm(double v) { return log(v); }
// a b + c, rounded once. Results must not depend on which products a compiler joins with sums.
__device__ inline float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// To the nearest, ties to even.
__device__ inline int32_t round_to_int(float v) { return __float2int_rn(v); }
__device__ inline int32_t atomic_add_shared(int32_t* at, int32_t v) { return atomicAdd(at, v); }

// c += A B of integers: A [16 rows, 32] unsigned bytes, B [32, 8] signed bytes. With g = lane / 4,
// t = lane % 4, a lane has of A, in its registers 0 .. 3, the columns 4 t .. 4 t + 3 of rows g and
// g + 8, then 16 + 4 t .. of both; of B column g, rows 4 t .. and 16 + 4 t ..; of c row g, columns
// 2 t and 2 t + 1, then the same of row g + 8.
__device__ inline void mma_bytes(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A B in float32: A [16, 16] and B [16, 8] of bfloat16. A lane has of A, two in each register,
// the columns 2 t, 2 t + 1 of rows g and g + 8, then 8 + 2 t .. of both; of B column g, rows 2 t ..
// and 8 + 2 t ..; of c as above.
__device__ inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace cuda
}  // namespace sk

#endif
