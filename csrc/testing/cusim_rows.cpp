// The launches of one divergence as host code.
#include "cuda/rows.cu"
