// The launches of the first pass of the rows schedule as host code.
#include "cuda/rows_statistics.cu"
