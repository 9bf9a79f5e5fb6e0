// The kernels of the dist schedule, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include "common/dist_params.h"
#include "math/correlation.h"

namespace fastkd::cuda {

// What lies in memory between the launches.
struct DistWorkspace {
  double* row_losses;     // [N]
  double* column_losses;  // [V]
  ColumnMoments* parts;   // [chunks, V]
  int64_t chunks;         // of rows; 0: columns have no weight, and are left out
};

int64_t dist_chunks(int64_t N, int64_t V);  // by which the results differ: it depends on nothing else

template <class T>
cudaError_t dist_forward(const DistParams<T>&, const DistWorkspace&, T* loss, cudaStream_t);
template <class T>
cudaError_t dist_backward(const DistParams<T>&, cudaStream_t);

}  // namespace fastkd::cuda
