// Launches of adaptive_kl_div's weights.
#include "cuda/head_kernel.cuh"
#include "cuda/head_launch.h"
#include "cuda/launch.cuh"
#include "cuda/rows_plan.h"

namespace fastkd::cuda {

template <class T>
cudaError_t head_weight(const RowsParams<T>& P, const Device& device, double* weight, cudaStream_t stream) {
  if (const int64_t inner = rows_side_by_side(P); inner > 0) {
    const int warps = int(std::clamp<int64_t>((P.V + 7) / 8, 1, kHeadWarps));
    const int64_t room = 32 * warps * kHeadRoom<T>, of_class = 32 * int64_t(sizeof(T));
    const int64_t kept = std::min(P.V, (device.shared_memory - room) / of_class), in_run = (inner + 31) / 32;
    const Launch launch(P.N / inner * in_run, dim3(32, warps), room + kept * of_class, stream, device.shared_memory);
    return launch(head_lanes_kernel<T>, P, weight, kept, inner, in_run);
  }
  int threads = 32;
  while (threads < kHeadThreads<T> && threads * 8 < P.V) threads *= 2;
  const int64_t room = (threads / 32 + 1) * kHeadRoom<T>;
  const int64_t kept = std::min<int64_t>(P.V, (device.shared_memory - room) / int64_t(sizeof(T)));
  const Launch launch(P.N, dim3(threads), room + kept * int64_t(sizeof(T)), stream, device.shared_memory);
  return launch(head_kernel<T>, P, weight, kept);
}

template cudaError_t head_weight<float>(const RowsParams<float>&, const Device&, double*, cudaStream_t);
#if !defined(FASTKD_SINGLE)  // a program that never computes in double is spared its kernels
template cudaError_t head_weight<double>(const RowsParams<double>&, const Device&, double*, cudaStream_t);
#endif

}  // namespace fastkd::cuda
