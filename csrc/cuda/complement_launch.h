// The kernels of what is beside K classes of a row, as the binding sees them: no torch header, no kernel.
#pragma once
#include "common/complement_params.h"
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

template <class T>
cudaError_t complement(const ComplementParams<T>&, bool backward, cudaStream_t);

}  // namespace fastkd::cuda
