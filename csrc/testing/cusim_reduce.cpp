// What stands around the rows, as host code.
#include "cuda/reduce.cu"
