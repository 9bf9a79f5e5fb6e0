// Small kernels for the tests of cusim, each right as kNone and wrong with one fault planted.
//   kernels FAULT MODE SEED   prints "right", "wrong" or "error: text"
//   kernels launches          prints what launches and queries return, one a line
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

enum class Fault {
  kNone,
  kGlobalBounds,
  kSharedBounds,
  kMisaligned,
  kNoBarrier,
  kDivergentBarrier,
  kOtherBarrier,
  kShuffleMask,
  kNoWarpBarrier,
  kPlainSum,
  kNoCopyWait,
  kNoClusterBarrier,
  kNoFirstClusterBarrier,
  kLeavesCluster,
  kClusterBarrierSkipped,
  kForeignAddress,
};

constexpr int kThreads = 64;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 8;
constexpr int kCluster = 4;

__device__ inline void cluster_sync(cusim::Site site = cusim::Site::here()) { cusim::cluster_barrier(site); }

__device__ inline float warp_sum(float x, unsigned mask = ~0u) {
#pragma unroll
  for (int bits = 16; bits; bits >>= 1) x += __shfl_xor_sync(mask, x, bits);
  return x;
}

// sums[b] = the sum of x[b], total = that of all
template <Fault kFault>
__global__ void __launch_bounds__(kThreads) block_sum_kernel(const float* __restrict__ x,  // [kBlocks, kThreads, 4]
                                                             float* sums,                  // [kBlocks]
                                                             float* total) {
  float* partial = static_cast<float*>(cusim::dynamic_shared());  // [kWarps]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* mine = x + (blockIdx.x * kThreads + threadIdx.x) * 4;
  if (kFault == Fault::kGlobalBounds) mine += 4;
  if (kFault == Fault::kMisaligned && threadIdx.x == 0) mine += 1;
  const float4 v = __ldcs(reinterpret_cast<const float4*>(mine));
  float sum = warp_sum(v.x + v.y + v.z + v.w);
  if (lane == 0) partial[kFault == Fault::kSharedBounds ? warp + 1 : warp] = sum;
  if (kFault == Fault::kDivergentBarrier) {
    if (warp == 0) __syncthreads();
  } else if (kFault == Fault::kOtherBarrier && warp == 0) {
    __syncthreads();
  } else if (kFault != Fault::kNoBarrier) {
    __syncthreads();
  }
  if (kFault == Fault::kShuffleMask ? threadIdx.x < kWarps : warp == 0) {
    sum = warp_sum(lane < kWarps ? partial[lane] : 0.0f);
    if (lane == 0) {
      sums[blockIdx.x] = sum;
      if (kFault == Fault::kPlainSum) {
        *total += sum;
      } else {
        atomicAdd(total, sum);
      }
    }
  }
}

__device__ inline void copy_now(const cusim::AsyncCopy& c) {
  *static_cast<float4*>(c.dst) = *static_cast<const float4*>(c.src);
}

// The same, of values that cp.async brings into shared memory.
template <Fault kFault>
__global__ void copy_sum_kernel(const float* __restrict__ x,  // [kBlocks, kThreads, 4]
                                float* sums,                  // [kBlocks]
                                float* total) {
  float4* stage = static_cast<float4*>(cusim::dynamic_shared());  // [kThreads]
  const cusim::AsyncCopy copy{&stage[threadIdx.x], x + (blockIdx.x * kThreads + threadIdx.x) * 4, 16, 0, 0};
  if (cusim::async_eager()) {
    copy_now(copy);
  } else {
    cusim::async_issue(copy);
  }
  cusim::async_commit();
  cusim::AsyncCopy done;
  while (kFault != Fault::kNoCopyWait && cusim::async_take(0, &done)) copy_now(done);
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += stage[i].x + stage[i].y + stage[i].z + stage[i].w;
    sums[blockIdx.x] = sum;
    atomicAdd(total, sum);
  }
}

// The same, of neighbouring lanes' values; for blocks whose last warp is not full, too.
template <Fault kFault>
__global__ void neighbour_sum_kernel(const float* __restrict__ x,  // [kBlocks, kThreads, 4]
                                     float* sums,                  // [kBlocks]
                                     float* total) {
  float* stage = static_cast<float*>(cusim::dynamic_shared());  // [blockDim.x]
  const float* mine = x + blockIdx.x * kThreads * 4;
  float sum = 0;
  for (unsigned i = threadIdx.x; i < kThreads * 4; i += blockDim.x) {
    stage[threadIdx.x] = mine[i];
    if (kFault != Fault::kNoWarpBarrier) __syncwarp(__ballot_sync(~0u, true));
    sum += stage[threadIdx.x ^ 1];
    __syncwarp(__ballot_sync(~0u, true));
  }
  atomicAdd(&sums[blockIdx.x], sum);
  atomicAdd(total, sum);
}

// The same, of a cluster: each block leaves its sum with every other one.
template <Fault kFault>
__global__ void cluster_sum_kernel(const float* __restrict__ x,  // [kBlocks, kThreads, 4]
                                   float* sums,                  // [kBlocks]
                                   float* total) {
  float* partial = static_cast<float*>(cusim::dynamic_shared());  // [kWarps]
  float* from = partial + kWarps;                                 // [kCluster], written by the others
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned rank = cusim::cluster_rank(), size = cusim::cluster_size();
  const float* mine = x + (blockIdx.x * kThreads + threadIdx.x) * 4;
  const float sum = warp_sum(mine[0] + mine[1] + mine[2] + mine[3]);
  if (lane == 0) partial[warp] = sum;
  if (kFault == Fault::kNoFirstClusterBarrier) {
    __syncthreads();
  } else {
    cluster_sync();  // every block has begun, and its partial sums are there
  }
  float block_sum = 0;
  for (int i = 0; i < kWarps; ++i) block_sum += partial[i];
  float* outside = sums;
  if (threadIdx.x < size) {
    const float* to = kFault == Fault::kForeignAddress ? outside : from;
    static_cast<float*>(cusim::map_shared(to, threadIdx.x))[rank] = block_sum;
  }
  if (kFault == Fault::kClusterBarrierSkipped && rank == 1 && warp == 1) return;
  if (kFault != Fault::kNoClusterBarrier) cluster_sync();
  float all = 0;
  for (unsigned r = 0; r < size; ++r) all += static_cast<const float*>(cusim::map_shared(from, r))[rank];
  if (kFault != Fault::kLeavesCluster) cluster_sync();  // nobody reads this block any more
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = all / size;  // each block holds this one's sum once
    atomicAdd(total, all / size);
  }
}

using Kernel = void (*)(const float*, float*, float*);

struct Case {
  const char* name;
  Kernel kernel;
  unsigned cluster = 1;
  size_t shared = kWarps * sizeof(float);
  unsigned threads = kThreads;
  bool clusters_ordered = false;  // for ThreadSanitizer
};

template <Fault kFault>
constexpr Case in_cluster(const char* name) {
  return {name, cluster_sum_kernel<kFault>, kCluster, (kWarps + kCluster) * sizeof(float)};
}

const Case kCases[] = {
    {"clean", block_sum_kernel<Fault::kNone>},
    {"global-bounds", block_sum_kernel<Fault::kGlobalBounds>},
    {"shared-bounds", block_sum_kernel<Fault::kSharedBounds>},
    {"misaligned", block_sum_kernel<Fault::kMisaligned>},
    {"no-barrier", block_sum_kernel<Fault::kNoBarrier>},
    {"divergent-barrier", block_sum_kernel<Fault::kDivergentBarrier>},
    {"other-barrier", block_sum_kernel<Fault::kOtherBarrier>},
    {"shuffle-mask", block_sum_kernel<Fault::kShuffleMask>},
    {"plain-sum", block_sum_kernel<Fault::kPlainSum>},
    {"plain-sum-ordered", block_sum_kernel<Fault::kPlainSum>, 1, kWarps * sizeof(float), kThreads, true},
    {"clean-neighbour", neighbour_sum_kernel<Fault::kNone>, 1, kThreads * sizeof(float)},
    {"clean-neighbour-16", neighbour_sum_kernel<Fault::kNone>, 1, 16 * sizeof(float), 16},
    {"no-warp-barrier", neighbour_sum_kernel<Fault::kNoWarpBarrier>, 1, kThreads * sizeof(float)},
    {"clean-copy", copy_sum_kernel<Fault::kNone>, 1, kThreads * sizeof(float4)},
    {"no-copy-wait", copy_sum_kernel<Fault::kNoCopyWait>, 1, kThreads * sizeof(float4)},
    in_cluster<Fault::kNone>("clean-cluster"),
    in_cluster<Fault::kNoClusterBarrier>("no-cluster-barrier"),
    in_cluster<Fault::kNoFirstClusterBarrier>("no-first-cluster-barrier"),
    in_cluster<Fault::kLeavesCluster>("leaves-cluster"),
    in_cluster<Fault::kClusterBarrierSkipped>("cluster-barrier-skipped"),
    in_cluster<Fault::kForeignAddress>("foreign-address"),
};

cudaError_t launch(const Case& c, unsigned blocks, const float* x, float* sums, float* total) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = c.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(c.threads);
  config.dynamicSmemBytes = c.shared;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, c.kernel, x, sums, total);
}

int run(const Case& c) {
  std::vector<float> x(kBlocks * kThreads * 4), sums(kBlocks), right(kBlocks);
  float total = 0, right_total = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = float(i * 7 % 11);  // small integers: sums are exact in every order
    right[i / (kThreads * 4)] += x[i];
    right_total += x[i];
  }
  cusim_races_in_cluster_only(c.clusters_ordered);
  const cudaError_t error = launch(c, kBlocks, x.data(), sums.data(), &total);
  if (error != cudaSuccess) {
    std::printf("error: %s\n", cudaGetErrorString(error));
    return 0;
  }
  std::puts(sums == right && total == right_total ? "right" : "wrong");
  return 0;
}

void print(const char* what, cudaError_t error) { std::printf("%s: %d\n", what, int(error)); }

int launches() {
  std::vector<float> x(kBlocks * kThreads * 4), sums(kBlocks);
  float total;
  const auto try_one = [&](const char* what, Case c, unsigned blocks) {
    print(what, launch(c, blocks, x.data(), sums.data(), &total));
  };
  Case c = in_cluster<Fault::kNone>("");
  try_one("cluster of 4", c, 8);
  c.cluster = 3;
  try_one("grid of 8 in clusters of 3", c, 8);
  c.cluster = 16;
  try_one("cluster of 16", c, 16);
  c.cluster = 4;
  cusim_device(cudaDevAttrComputeCapabilityMajor, 8);
  try_one("cluster on an older GPU", c, 8);
  cusim_device(cudaDevAttrComputeCapabilityMajor, -1);
  c.shared = 64 << 10;
  try_one("64 KiB of shared memory", c, 8);
  print("the last error", cudaGetLastError());
  print("the last error, again", cudaPeekAtLastError());
  print("allow 64 KiB", cudaFuncSetAttribute(c.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10));
  try_one("64 KiB, allowed", c, 8);
  print("allow 228 KiB", cudaFuncSetAttribute(c.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10));
  int device = -1, sms = 0;
  print("device", cudaGetDevice(&device));
  print("multiprocessors", cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  std::printf("%d of device %d\n", sms, device);
  try_one("a failing kernel", in_cluster<Fault::kForeignAddress>(""), 4);
  std::printf("the text is cusim's: %d\n", !std::strcmp(cusim_error(), cudaGetErrorString(cudaErrorLaunchFailure)));
  try_one("the next one", in_cluster<Fault::kNone>(""), 4);
  std::printf("an error: %d\n", cusim_error() != nullptr);
  return 0;
}

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "launches")) return launches();
  if (argc != 4) return 2;
  cusim_order(std::atoi(argv[2]), std::atoi(argv[3]));
  for (const Case& c : kCases) {
    if (!std::strcmp(c.name, argv[1])) return run(c);
  }
  return 2;
}
