// The launches of one storage of the pairs schedule as host code.
#include "cuda/pairs.cu"
