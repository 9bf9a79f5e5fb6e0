// The PTX that the kernels use, each instruction once: the instruction for nvcc, its meaning for
// the tests that run kernels on the host (csrc/testing/cusim).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastkd::ptx {

#if defined(__CUDACC__)

#define FASTKD_NOINLINE __noinline__

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char shared_memory[];
  return shared_memory;
}

// Copies 16 bytes past the registers and the L1 cache; both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of this thread but the last kPending have arrived.
template <int kPending>
__device__ __forceinline__ void copy_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// All copies of this thread have arrived.
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// 2^x to 2 ulp; 0 for x = -inf, and where the result would be subnormal.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x within [-bound, bound]; a NaN stays.
__device__ __forceinline__ float clamp(float x, float bound) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-bound));
  return x;
}

// Of a launch without the cluster attribute: rank 0 of 1. Older GPUs have no clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned n;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// Where p of this block's shared memory lies in the block `rank` of the cluster.
template <class T>
__device__ __forceinline__ const T* map_shared(const T* p, unsigned rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<const T*>(mapped);
}
#else
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier() {}
template <class T>
__device__ __forceinline__ const T* map_shared(const T* p, unsigned) {
  return p;
}
#endif

#else

#define FASTKD_NOINLINE __attribute__((noinline))

inline char* dynamic_shared() { return static_cast<char*>(cusim::dynamic_shared()); }

inline void copy_now(const cusim::AsyncCopy& c) { *static_cast<uint4*>(c.dst) = *static_cast<const uint4*>(c.src); }
inline void copy_async_16(void* shared, const void* global) {
  const cusim::AsyncCopy c{shared, global, 16, 0, 0};
  if (cusim::async_eager()) {
    copy_now(c);
  } else {
    cusim::async_issue(c);
  }
}
inline void copy_async_commit() { cusim::async_commit(); }
template <int kPending>
void copy_async_wait_group() {
  cusim::AsyncCopy c;
  while (cusim::async_take(kPending, &c)) copy_now(c);
}
inline void copy_async_wait() {
  copy_async_commit();
  copy_async_wait_group<0>();
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float clamp(float x, float bound) { return x < -bound ? -bound : x > bound ? bound : x; }

using cusim::cluster_rank;
using cusim::cluster_size;
inline void cluster_barrier(cusim::Site site = cusim::Site::here()) { cusim::cluster_barrier(site); }
template <class T>
const T* map_shared(const T* p, unsigned rank) {
  return static_cast<const T*>(cusim::map_shared(p, rank));
}

#endif

}  // namespace fastkd::ptx
