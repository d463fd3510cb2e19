#include "image.hpp"

#if defined(SPARSE_KERNELS_IMAGE)

// Aligned as nvcc aligns it.
asm(R"(
.section .rodata
.balign 16
.hidden sk_cuda_image
.globl sk_cuda_image
sk_cuda_image:
.incbin ")" SPARSE_KERNELS_IMAGE R"("
.previous
)");
extern "C" __attribute__((visibility("hidden"))) const unsigned char sk_cuda_image[];

namespace sk {
namespace cuda {

const void* const embedded_image = sk_cuda_image;
const char* const embedded_image_cuda = SPARSE_KERNELS_IMAGE_CUDA;

}  // namespace cuda
}  // namespace sk

#else

namespace sk {
namespace cuda {

const void* const embedded_image = nullptr;
const char* const embedded_image_cuda = "";

}  // namespace cuda
}  // namespace sk

#endif
