// The launches of attention transfer.
#include "cuda/attention_kernel.cuh"
#include "cuda/launch.cuh"

namespace fastkd::cuda {

template <class T>
cudaError_t attention_powers(const AttentionPowers<T>& A, int64_t blocks, cudaStream_t stream) {
  const Launch launch(blocks, dim3(kFeaturesThreads), A.room * sizeof(double), stream);
  return A.p == 2 ? launch(attention_powers_kernel<T, true>, A) : launch(attention_powers_kernel<T, false>, A);
}

template <class T>
cudaError_t attention_maps(const AttentionMaps<T>& M, int64_t samples, cudaStream_t stream) {
  return Launch(samples, dim3(kMapThreads), 4 * kMapThreads / 32 * sizeof(double), stream)(attention_maps_kernel<T>, M);
}

template <class T>
cudaError_t attention_slopes(const AttentionSlopes<T>& A, int64_t blocks, cudaStream_t stream) {
  const Launch launch(blocks, dim3(kFeaturesThreads), 0, stream);
  return A.p == 2 ? launch(attention_slopes_kernel<T, true>, A) : launch(attention_slopes_kernel<T, false>, A);
}

#define FASTKD_INSTANTIATE(T)                                                                 \
  template cudaError_t attention_powers<T>(const AttentionPowers<T>&, int64_t, cudaStream_t); \
  template cudaError_t attention_maps<T>(const AttentionMaps<T>&, int64_t, cudaStream_t);     \
  template cudaError_t attention_slopes<T>(const AttentionSlopes<T>&, int64_t, cudaStream_t);
FASTKD_INSTANTIATE(float)
FASTKD_INSTANTIATE(double)

}  // namespace fastkd::cuda
