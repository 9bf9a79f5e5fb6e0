// The kernels of adaptive_kl_div's weights, as the binding sees them.
#pragma once
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

// weight [N]; P.parameter is mu.
template <class T>
cudaError_t head_weight(const RowsParams<T>& P, const Device&, double* weight, cudaStream_t);

}  // namespace fastkd::cuda
