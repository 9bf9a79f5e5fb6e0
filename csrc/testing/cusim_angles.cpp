// The launches of the angles schedule as host code.
#include "cuda/angles.cu"
