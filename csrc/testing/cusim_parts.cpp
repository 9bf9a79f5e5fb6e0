// The launches of what is told of rows besides their loss, as host code.
#include "cuda/parts.cu"
