// The launches of the dist schedule as host code.
#include "cuda/dist.cu"
