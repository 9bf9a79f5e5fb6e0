// The launches of the triples schedule as host code.
#include "cuda/triples.cu"
