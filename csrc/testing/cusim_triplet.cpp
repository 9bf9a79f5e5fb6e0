// The launches of a strip of triplets as host code.
#include "cuda/triplet.cu"
