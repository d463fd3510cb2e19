// The compiled kernels inside the library.
#pragma once

namespace sk {
namespace cuda {

// A fatbin of all architectures; null where the library was built without nvcc.
extern const void* const embedded_image;
// "13.0", the CUDA that compiled it; "" where there is none.
extern const char* const embedded_image_cuda;

}  // namespace cuda
}  // namespace sk
