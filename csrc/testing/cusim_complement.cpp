// The launches of what is beside K classes of a row as host code.
#include "cuda/complement.cu"
