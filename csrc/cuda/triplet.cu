// The launches of a strip of triplets.
#include "cuda/launch.cuh"
#include "cuda/triplet_kernel.cuh"

namespace fastkd::cuda {

template <class T>
cudaError_t triplet_strip(const TripletParams<T>& P, cudaStream_t stream) {
  if (P.rows > 0) {
    FASTKD_CUDA_RETURN(
        Launch(P.rows, dim3(kTripletThreads), TripletRoom<T>::bytes(P.room), stream)(triplet_kernel<T>, P));
  }
  const int64_t columns = P.near ? (P.N + 31) / 32 : 0;
  constexpr int64_t kRoom = 3 * kTripletWarps * sizeof(double);
  return Launch(columns + 1, dim3(kTripletThreads), kRoom, stream)(triplet_finish_kernel<T>, P);
}

template cudaError_t triplet_strip<float>(const TripletParams<float>&, cudaStream_t);
template cudaError_t triplet_strip<double>(const TripletParams<double>&, cudaStream_t);

}  // namespace fastkd::cuda
