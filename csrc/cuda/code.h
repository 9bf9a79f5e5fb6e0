// Whether this library has code for a GPU. Its sources are compiled for the same GPUs, and one kernel tells of all.
#pragma once
#include <cuda_runtime_api.h>

namespace fastkd::cuda {

// Of the current GPU: the driver's error where a kernel could not be launched on it.
cudaError_t find_code();

}  // namespace fastkd::cuda
