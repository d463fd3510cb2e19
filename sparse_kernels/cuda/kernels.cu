// All kernels.
#include "attention.cuh"
#include "rows.cuh"
