// What stands around the rows: the divisor where the host does not know it, the sum of the rows'
// losses, and the upstream factor. One block each for the first two: N values, in one order.
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows_launch.h"
#include "cuda/vec.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 1024;

__device__ double sum_of_block(double x) {
  return block_sum<kThreads / 32>(x, reinterpret_cast<double*>(ptx::dynamic_shared()));
}

template <class T>
__global__ void __launch_bounds__(kThreads) rows_scale_kernel(RowsScale R) {
  double valid = 0;
  for (int64_t n = threadIdx.x; R.mask && n < R.N; n += kThreads) valid += R.mask[n];
  valid = R.mask ? sum_of_block(valid) : double(R.N);
  if (threadIdx.x) return;
  double divisor = R.divisor * (R.per_row ? valid : 1.0);
  if (R.normalizer) divisor = double(*static_cast<const T*>(R.normalizer));
  *R.scale = valid == 0 ? 0.0 : 1.0 / divisor;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    rows_sum_kernel(const T* __restrict__ loss, int64_t N, double scale, const double* scale_in_memory, T* sum) {
  double x = 0;
  for (int64_t n = threadIdx.x; n < N; n += kThreads) x += double(loss[n]);
  x = sum_of_block(x);
  if (scale_in_memory) scale = *scale_in_memory;
  if (threadIdx.x == 0) *sum = scale == 0 ? T(0) : T(x * scale);
}

// grid: the parts' blocks, one part after the other.
template <class T>
__global__ void __launch_bounds__(256) scale_kernel(const __grid_constant__ Scale<T> S) {
  const T f = *S.factor;
  if (f == T(1)) return;
  int p = 0;
  while (p + 1 < S.count && S.parts[p + 1].first_block <= int(blockIdx.x)) ++p;
  const auto [x, n, type, size, first] = S.parts[p];
  const int blocks = (p + 1 < S.count ? S.parts[p + 1].first_block : int(gridDim.x)) - first;
  const int64_t begin = (blockIdx.x - first) * int64_t(blockDim.x) + threadIdx.x, step = int64_t(blocks) * blockDim.x;
  const int64_t packs = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? n / kPack : 0;
  T v[kPack];
  for (int64_t i = begin; i < packs; i += step) {
    char* at = x + i * kPack * size;
    load_pack<AnyType, Memory::kGlobalLast>(at, type, v);
#pragma unroll
    for (int k = 0; k < kPack; ++k) v[k] *= f;
    store_pack<AnyType>(at, type, v);
  }
  for (int64_t i = packs * kPack + begin; i < n; i += step) {
    store_one<AnyType>(x + i * size, type, load_one<AnyType, T>(x + i * size, type) * f);
  }
}

constexpr int64_t kRoom = kThreads / 32 * sizeof(double);

}  // namespace

cudaError_t current_device(Device& device) {
  int index = 0;
  FASTKD_CUDA_RETURN(cudaGetDevice(&index));
  FASTKD_CUDA_RETURN(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
  FASTKD_CUDA_RETURN(cudaDeviceGetAttribute(&device.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
  FASTKD_CUDA_RETURN(cudaDeviceGetAttribute(&device.l2_cache, cudaDevAttrL2CacheSize, index));
  return cudaDeviceGetAttribute(&device.compute_major, cudaDevAttrComputeCapabilityMajor, index);
}

template <class T>
cudaError_t rows_scale(const RowsScale& R, cudaStream_t stream) {
  return Launch(1, dim3(kThreads), kRoom, stream)(rows_scale_kernel<T>, R);
}
template <class T>
cudaError_t rows_sum(const T* loss, int64_t N, double scale, const double* scale_in_memory, T* sum,
                     cudaStream_t stream) {
  return Launch(1, dim3(kThreads), kRoom, stream)(rows_sum_kernel<T>, loss, N, scale, scale_in_memory, sum);
}
template <class T>
cudaError_t scale(Scale<T> S, const Device& device, cudaStream_t stream) {
  double all = 0;
  for (int p = 0; p < S.count; ++p) all += double(S.parts[p].n);
  int64_t blocks = 0;
  for (int p = 0; p < S.count; ++p) {
    const int64_t wanted = (S.parts[p].n / kPack + 255) / 256 + 1;
    const int64_t most = int64_t(double(S.parts[p].n) / all * 8 * device.multiprocessors) + 1;
    S.parts[p].first_block = int32_t(blocks);
    blocks += wanted < most ? wanted : most;
  }
  return Launch(blocks, dim3(256), 0, stream)(scale_kernel<T>, S);
}

#define FASTKD_INSTANTIATE(T)                                                                   \
  template cudaError_t rows_scale<T>(const RowsScale&, cudaStream_t);                           \
  template cudaError_t rows_sum<T>(const T*, int64_t, double, const double*, T*, cudaStream_t); \
  template cudaError_t scale<T>(Scale<T>, const Device&, cudaStream_t);
FASTKD_INSTANTIATE(float)
FASTKD_INSTANTIATE(double)

}  // namespace fastkd::cuda
