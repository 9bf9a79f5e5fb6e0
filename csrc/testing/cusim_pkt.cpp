// The launches of a strip of cosines as host code.
#include "cuda/pkt.cu"
