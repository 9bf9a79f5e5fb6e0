#include "cuda/code.h"

namespace fastkd::cuda {
namespace {

__global__ void code_kernel() {}

}  // namespace

cudaError_t find_code() {
  cudaFuncAttributes attributes;
  const cudaError_t found = cudaFuncGetAttributes(&attributes, code_kernel);
  cudaGetLastError();  // it is answered here, and torch looks for errors that were left behind
  return found;
}

}  // namespace fastkd::cuda
