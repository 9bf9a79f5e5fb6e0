// The launches of what standardizes logits.
#include "cuda/launch.cuh"
#include "cuda/rows_plan.h"
#include "cuda/standardize_kernel.cuh"

namespace fastkd::cuda {

template <class T>
cudaError_t standardize(const StandardizeParams<T>& P, bool backward, cudaStream_t stream) {
  if (const int64_t inner = side_by_side(P); inner >= kLeastInner) {
    const int64_t in_run = (inner + 31) / 32;
    const int warps = int(std::clamp<int64_t>((P.rows.V + 7) / 8, 1, kStandardizeThreads / 32));
    const Launch launch(P.rows.N / inner * in_run, dim3(32, warps), 3 * 32 * warps * sizeof(MomentSums), stream);
    return backward ? launch(standardize_bwd_kernel<T, LaneWalk<T>>, P, inner, in_run)
                    : launch(standardize_fwd_kernel<T, LaneWalk<T>>, P, inner, in_run);
  }
  const int threads = threads_for(P.rows.V / kPack), rows = std::max(1, 128 / threads);
  static_assert(kPlanThreads == kStandardizeThreads);
  const Launch launch((P.rows.N + rows - 1) / rows, dim3(threads, rows),
                      3 * (threads * rows / 32 + 1) * sizeof(MomentSums), stream);
  return backward ? launch(standardize_bwd_kernel<T, RowWalk<T>>, P, int64_t(0), int64_t(0))
                  : launch(standardize_fwd_kernel<T, RowWalk<T>>, P, int64_t(0), int64_t(0));
}

template cudaError_t standardize<float>(const StandardizeParams<float>&, bool, cudaStream_t);
template cudaError_t standardize<double>(const StandardizeParams<double>&, bool, cudaStream_t);

}  // namespace fastkd::cuda
