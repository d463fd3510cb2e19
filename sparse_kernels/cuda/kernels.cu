// All kernels, in one piece of code.
#include "dot.cuh"
