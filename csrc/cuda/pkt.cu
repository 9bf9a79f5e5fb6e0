// The launches of a strip of cosines.
#include "cuda/launch.cuh"
#include "cuda/pkt_kernel.cuh"

namespace fastkd::cuda {

template <class T>
cudaError_t pkt_strip(const PktParams<T>& P, cudaStream_t stream) {
  constexpr int kWarps = kPktThreads / 32;
  const int64_t tiles = P.row_tiles * P.column_tiles;
  const auto aligned = [](const T* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (tiles > 0) {
    const Launch launch((tiles + kWarps - 1) / kWarps, dim3(kPktThreads), 0, stream);
    const bool wide = P.columns % kPktOwn == 0 && aligned(P.student) && aligned(P.teacher);
    FASTKD_CUDA_RETURN(wide ? launch(pkt_kernel<T, true>, P) : launch(pkt_kernel<T, false>, P));
  }
  constexpr int64_t kRoom = kPktSumThreads / 32 * 33 * sizeof(double);
  return Launch((P.columns + 31) / 32 + 1, dim3(kPktSumThreads), kRoom, stream)(pkt_sum_kernel<T>, P);
}

template cudaError_t pkt_strip<float>(const PktParams<float>&, cudaStream_t);
template cudaError_t pkt_strip<double>(const PktParams<double>&, cudaStream_t);

}  // namespace fastkd::cuda
