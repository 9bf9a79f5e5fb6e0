// The kernels that standardize logits, as the binding sees them: no torch header, no kernel.
#pragma once
#include "common/standardize_params.h"
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

template <class T>
cudaError_t standardize(const StandardizeParams<T>&, bool backward, cudaStream_t);

}  // namespace fastkd::cuda
