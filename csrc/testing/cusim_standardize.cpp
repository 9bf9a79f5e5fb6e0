// The launches of what standardizes logits as host code.
#include "cuda/standardize.cu"
