// Launches of the features schedule, and what stands around it: the number of rows that count, and
// what the blocks' sums add up to.
#include "cuda/features_kernel.cuh"
#include "cuda/launch.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kSumThreads = 1024;
constexpr int64_t kSumRoom = kSumThreads / 32 * 2 * sizeof(double);

// How many of the four bytes of a word are not 0.
__device__ int true_bytes(uint32_t w) {
  w |= w >> 4;
  w |= w >> 2;
  w |= w >> 1;
  return __popc(w & 0x01010101u);
}

// A block a layer.
__global__ void __launch_bounds__(kSumThreads) features_count_kernel(const __grid_constant__ FeaturesCounts C) {
  const int l = blockIdx.x;
  const bool* mask = C.mask[l];
  const int64_t N = C.N[l], packs = reinterpret_cast<uintptr_t>(mask) % 16 == 0 ? N / 16 : 0;
  int64_t valid = 0;
  for (int64_t i = threadIdx.x; i < packs; i += kSumThreads) {
    const uint4 x = reinterpret_cast<const uint4*>(mask)[i];
    valid += true_bytes(x.x) + true_bytes(x.y) + true_bytes(x.z) + true_bytes(x.w);
  }
  for (int64_t i = 16 * packs + threadIdx.x; i < N; i += kSumThreads) valid += mask[i];
  const double sum = block_sum<kSumThreads / 32>(double(valid), reinterpret_cast<double*>(ptx::dynamic_shared()));
  if (threadIdx.x == 0) C.scales[l] = sum == 0 ? 0 : 1 / (sum * C.divisor[l]);
}

// One block: some warps a layer, as many for each.
template <class T>
__global__ void __launch_bounds__(kSumThreads) features_finish_kernel(const __grid_constant__ FeaturesLosses<T> L) {
  double *of_warps = reinterpret_cast<double*>(ptx::dynamic_shared()), *of_layers = of_warps + kSumThreads / 32;
  const int thread = threadIdx.x, warp = thread / 32;
  int warps = kSumThreads / 32;
  while (warps > 1 && warps * L.count > kSumThreads / 32) warps /= 2;
  const int l = warp / warps;
  double sum = 0;
  if (l < L.count) {
    for (int b = L.first_block[l] + thread % (32 * warps); b < L.first_block[l + 1]; b += 32 * warps) {
      sum += L.partials[b];
    }
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) of_warps[warp] = sum;
  __syncthreads();
  if (thread < L.count) {
    double found = 0;
    for (int w = 0; w < warps; ++w) found += of_warps[thread * warps + w];
    const double scale = L.scales ? L.scales[thread] : L.scale[thread];
    found = scale == 0 ? 0 : found * scale;
    L.layers[thread] = T(found);
    of_layers[thread] = found * L.layer_weight[thread];
  }
  __syncthreads();
  if (thread) return;
  double total = L.first ? 0 : *L.total;
  for (int i = 0; i < L.count; ++i) total += of_layers[i];
  *L.total = total;
  if (L.loss) *L.loss = T(total);
}
static_assert(kFeaturesLayers <= kSumThreads / 32);

template <class T, Feature F, class Distance>
cudaError_t launch_of(const FeaturesParams<T>& P, int64_t blocks, cudaStream_t stream) {
  int64_t shared = kFeaturesThreads / 32 * sizeof(double);
  if (F != Feature::kPlain) {
    shared = P.state_rows * sizeof(RowState<T>) + 3 * P.room * sizeof(double);
  } else if (P.row_loss) {
    shared = P.state_rows * sizeof(RowState<T>) + P.room * sizeof(double);
  }
  return Launch(blocks, dim3(kFeaturesThreads), shared, stream)(features_kernel<T, F, Distance>, P);
}

template <class T, Feature F>
cudaError_t launch(const FeaturesParams<T>& P, int64_t blocks, cudaStream_t stream) {
  return P.of_smooth_l1 ? launch_of<T, F, SmoothL1<T>>(P, blocks, stream)
                        : launch_of<T, F, Squares<T>>(P, blocks, stream);
}

}  // namespace

template <class T>
cudaError_t features(const FeaturesParams<T>& P, int64_t blocks, cudaStream_t stream) {
  switch (P.feature) {
    case Feature::kPlain:
      return launch<T, Feature::kPlain>(P, blocks, stream);
    case Feature::kStandardized:
      return launch<T, Feature::kStandardized>(P, blocks, stream);
    default:  // cosine as well: half of it, by P.feature
      return launch<T, Feature::kL2>(P, blocks, stream);
  }
}

cudaError_t features_count(const FeaturesCounts& C, cudaStream_t stream) {
  return Launch(C.count, dim3(kSumThreads), kSumRoom, stream)(features_count_kernel, C);
}

template <class T>
cudaError_t features_finish(const FeaturesLosses<T>& L, cudaStream_t stream) {
  return Launch(1, dim3(kSumThreads), kSumRoom, stream)(features_finish_kernel<T>, L);
}

#define FASTKD_INSTANTIATE(T)                                                        \
  template cudaError_t features<T>(const FeaturesParams<T>&, int64_t, cudaStream_t); \
  template cudaError_t features_finish<T>(const FeaturesLosses<T>&, cudaStream_t);
FASTKD_INSTANTIATE(float)
FASTKD_INSTANTIATE(double)

}  // namespace fastkd::cuda
