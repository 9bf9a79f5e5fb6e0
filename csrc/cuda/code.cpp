// Asked before the backend is chosen: no launch fails for want of code.
#include "cuda/code.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "calls.h"
#include "divergence_list.h"

namespace fastkd {
namespace {

// "" where the current GPU has code here, else the driver's reason. Not registered for a device: it takes no tensor.
void cuda_code(StableIValue* stack, uint64_t, uint64_t) {
  const cudaError_t found = cuda::find_code();
  stack[0] = torch::stable::detail::from(std::string(found == cudaSuccess ? "" : cudaGetErrorString(found)));
}

void cuda_calls(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(std::string(kCallsDigest) + "," + kDivergencesDigest);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("cuda_code", &cuda_code);
  m.impl("cuda_calls", &cuda_calls);
}

}  // namespace fastkd
