// Which instruction set the kernels use.
#pragma once

#include "sparse_kernels.h"

namespace sk {

// Turns a requested level into one that this CPU runs, or fails (status, sk_last_error).
// SK_ISA_AUTO follows SPARSE_KERNELS_ISA.
int32_t resolve_isa(int32_t requested, sk_isa* resolved);

}  // namespace sk
