// The launches of the features schedule as host code.
#include "cuda/features.cu"
