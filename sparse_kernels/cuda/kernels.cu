// All kernels, in one piece of code.
#include "activate.cuh"
#include "dot.cuh"
#include "down.cuh"
