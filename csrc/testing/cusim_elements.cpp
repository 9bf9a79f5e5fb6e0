// The launches of the elements schedule as host code.
#include "cuda/elements.cu"
