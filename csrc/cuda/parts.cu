// Launches of what is told of rows besides their loss.
#include "cuda/launch.cuh"
#include "cuda/parts_kernel.cuh"
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

template <class T>
cudaError_t rows_parts(const RowsParams<T>& P, cudaStream_t stream) {
  constexpr int64_t kShortRow = 1024;  // classes: a warp a row
  const int threads = P.V <= kShortRow ? 32 : kPartsThreads, rows = kPartsThreads / threads;
  const Launch launch((P.N + rows - 1) / rows, dim3(threads, rows), sizeof(PartsRoom<T>), stream);
  return launch(parts_kernel<T>, P, P.divergence == Divergence::kBernoulliKL);
}

template cudaError_t rows_parts<float>(const RowsParams<float>&, cudaStream_t);
#if !defined(FASTKD_SINGLE)  // a program that never computes in double is spared its kernel
template cudaError_t rows_parts<double>(const RowsParams<double>&, cudaStream_t);
#endif

}  // namespace fastkd::cuda
