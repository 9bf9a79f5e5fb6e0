// Sums and maxima over the lanes of a warp, and over the groups of threads that share a row. Every
// lane gets the same bits: the order is that of the lanes, never that of arrival.
#pragma once
#include <cuda_runtime.h>

#include "cuda/ptx.cuh"

namespace fastkd::cuda {

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int bit = 16; bit; bit >>= 1) x += __shfl_xor_sync(0xffffffffu, x, bit);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int bit = 16; bit; bit >>= 1) {
    const T y = __shfl_xor_sync(0xffffffffu, x, bit);
    x = y > x ? y : x;
  }
  return x;
}

// Over a block of kWarps warps. room: [kWarps] in shared memory, for this one sum alone.
template <int kWarps>
__device__ __forceinline__ double block_sum(double x, double* room) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x += room[w];
  return x;
}

// Combines a value of type X over the threads that share a row: the lanes of each warp, then the
// warps of the group, then the blocks of the cluster. X::combine(x) combines over a warp's lanes,
// X::empty() is what changes nothing.
//   group  the warps [first_warp, first_warp + warps) of this block
//   room   [warps of the block + 1] in shared memory, used for this one combination alone
// With a cluster there is one group a block. The caller passes a cluster barrier before it leaves
// the kernel: until then others may read its room.
template <class X>
__device__ __forceinline__ X combine_over_row(X x, X* room, int first_warp, int warps, int block_warps) {
  const int lane = threadIdx.x % 32, warp = (threadIdx.x + blockDim.x * threadIdx.y) / 32;
  x = X::combine(x);
  if (warps > 1) {
    if (lane == 0) room[warp] = x;
    __syncthreads();
    x = X::combine(lane < warps ? room[first_warp + lane] : X::empty());
  }
  const int blocks = int(ptx::cluster_size());
  if (blocks > 1) {
    X* own = room + block_warps;
    if (warp == 0 && lane == 0) *own = x;
    ptx::cluster_barrier();
    x = X::combine(lane < blocks ? *ptx::map_shared(own, unsigned(lane)) : X::empty());
  }
  return x;
}

}  // namespace fastkd::cuda
