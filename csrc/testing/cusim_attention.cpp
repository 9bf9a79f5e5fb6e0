// The launches of attention transfer as host code.
#include "cuda/attention.cu"
