// The pairs schedule for other bindings of this library.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "cuda/context.h"

namespace fastkd::cuda {

// loss [] += weight * rkd_distance (means as scale) of student [N, D_s] and teacher [N, D_t]; where
// grad is given, grad [N, D_s] += weight * its gradient. Both in the compute type (float64 where an
// input is, else float32), contiguous, and filled by work that is on the context's stream before.
// count: on the device, or null. The inputs were checked (common/embeddings_inputs.h). N = 0 and N = 1 add
// nothing.
void pairs_accumulate(const torch::stable::Tensor& student, const torch::stable::Tensor& teacher, double delta,
                      double weight, const int64_t* count, const torch::stable::Tensor& loss,
                      const torch::stable::Tensor* grad, const Context&);

}  // namespace fastkd::cuda
