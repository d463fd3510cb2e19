// All kernels, in one piece of code.
#include "activate.cuh"
#include "attention.cuh"
#include "candidates.cuh"
#include "dot.cuh"
#include "down.cuh"
#include "heads.cuh"
#include "neurons.cuh"
#include "rows.cuh"
