// The launches of adaptive_kl_div's weights as host code.
#include "cuda/head.cu"
