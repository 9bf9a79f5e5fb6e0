// Sums the classes of a row beside K of them, on the GPU, and takes a gradient back to all: see fastkd/ops/top_k.py.
// Threads share rows as they do where logits are standardized. Which classes are among the K a bit says in shared
// memory: one for each class, or, where there are too many of them, for 2^shift classes that lie together; then the K
// themselves are looked through where the bit is set. Forward reads a row once, and so does backward.
#pragma once
#include "cuda/complement_launch.h"
#include "cuda/standardize_kernel.cuh"

namespace fastkd::cuda {

// Of some classes: their maximum, and the sum of e^((z - max) / T).
template <class T>
struct RestSums {
  T max, sum, exp2_scale;

  static __device__ RestSums empty() { return {kNone<T>, T(0), T(0)}; }
  static __device__ RestSums combine(RestSums x) {
    const T max = warp_max(x.max), scale = warp_max(x.exp2_scale);  // an empty lane has no scale of its own
    moved(x.max, x.sum, max, scale);
    return {max, warp_sum(x.sum), scale};
  }
};

// The K classes of a row. Threads of a row write it together, and all threads of the block meet then.
struct Listed {
  unsigned* bits;
  const int64_t* indices;
  int64_t K;
  int shift;

  __device__ Listed(char* room, int64_t words, const int64_t* indices, int64_t K, int64_t V, int shift, bool counts)
      : bits(reinterpret_cast<unsigned*>(room) + threadIdx.y * words), indices(indices), K(K), shift(shift) {
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) bits[i] = 0;
    __syncthreads();
    for (int64_t k = threadIdx.x; counts && k < K; k += blockDim.x) {
      const int64_t v = indices[k];
      if (v >= 0 && v < V) atomicOr(bits + (v >> shift) / 32, 1u << ((v >> shift) % 32));
    }
    __syncthreads();
  }
  // s: the classes from v on; of the K, -inf takes their place.
  template <int kCount, class T>
  __device__ __forceinline__ void leave_out(int64_t v, T (&s)[kCount]) const {
    const int64_t first = v >> shift;  // its bit and those behind it, of two words: all that kCount classes can have
    const uint64_t window = uint64_t(bits[first / 32 + 1]) << 32 | bits[first / 32];
    if (!(window >> (first % 32) & ((1u << kCount) - 1))) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bool found = shift == 0 && (window >> (first % 32 + i) & 1u);
      for (int64_t k = 0; shift != 0 && !found && k < K; ++k) found = indices[k] == v + i;
      s[i] = found ? -kInf<T> : s[i];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kStandardizeThreads, 2)
    complement_fwd_kernel(const __grid_constant__ ComplementParams<T> C, int64_t words, int shift, int64_t room) {
  const RowsParams<T>& P = C.rows;
  const RowWalk<T> walk(C, 0, 0);
  const int64_t row = walk.row;
  const bool counts = walk.exists && (!P.mask || P.mask[row]);  // nothing is read of a row that is masked out
  const char* student = walk.at.student;
  const Listed known(ptx::dynamic_shared() + room, words, C.indices + row * C.K, C.K, P.V, shift, counts);
  double* logits = C.logits + row * (C.K + 1);
  for (int64_t k = threadIdx.x; walk.exists && k < C.K; k += blockDim.x) {
    const int64_t v = known.indices[k];
    double z = 0;
    if (counts) z = v < 0 ? -kInf<double> : kInf<double> - kInf<double>;
    if (counts && v >= 0 && v < P.V) {
      z = double(load_one<AnyType, T>(student + bytes_to(P.student, v), P.student.dtype));
    }
    logits[k] = z;
  }

  const T temperature = T(P.temperature[row]);
  RestSums<T> own{kNone<T>, T(0), kLog2e<T> / temperature};
  walk.each(counts, [&](int64_t v, auto n) {
    T s[n.value];
    load_classes<n.value>(student + bytes_to(P.student, v), P.student.dtype, s);
    known.leave_out(v, s);
    T max = own.max;
#pragma unroll
    for (int i = 0; i < n.value; ++i) {
      max = s[i] > max ? s[i] : max;
    }
    if (max > own.max) moved(own.max, own.sum, max, own.exp2_scale);
#pragma unroll
    for (int i = 0; i < n.value; ++i) own.sum += exp2_of((s[i] - own.max) * own.exp2_scale);
  });
  const RestSums<T> all = walk.combine(own, 0);
  if (!walk.exists || !walk.leads()) return;
  C.sums[row] = counts && all.sum != T(0) ? ComplementSums{double(all.max), double(all.sum)} : ComplementSums{0, 0};
  const double rest = double(all.max) + double(temperature) * log(double(all.sum));
  logits[C.K] = !counts ? 0 : all.sum == T(0) ? -kInf<double> : rest;
}

template <class T>
__global__ void __launch_bounds__(kStandardizeThreads, 2)
    complement_bwd_kernel(const __grid_constant__ ComplementParams<T> C) {
  const RowsParams<T>& P = C.rows;
  const RowWalk<T> walk(C, 0, 0);
  const int64_t row = walk.row;
  const bool counts = walk.exists && (!P.mask || P.mask[row]);
  const char *student = walk.at.student, *addend = C.addend ? walk.at.teacher : nullptr;
  const double* upstream = C.upstream + row * (C.K + 1);
  const ComplementSums sums = counts ? C.sums[row] : ComplementSums{0, 0};
  const T share = counts ? T(sums.share(upstream[C.K])) : T(0), max = T(sums.max);
  const T exp2_scale = kLog2e<T> / T(P.temperature[row]);
  walk.each(walk.exists, [&](int64_t v, auto n) {
    T s[n.value] = {}, g[n.value] = {};
    if (counts) load_classes<n.value>(student + bytes_to(P.student, v), P.student.dtype, s);
    if (addend) load_classes<n.value>(addend + bytes_to(P.teacher, v), P.teacher.dtype, g);
#pragma unroll
    for (int i = 0; i < n.value; ++i) g[i] += counts ? exp2_of((s[i] - max) * exp2_scale) * share : T(0);
    store_classes<n.value>(walk.at.grad + bytes_to(P.grad, v), P.grad.dtype, g);
  });
  __syncthreads();  // what follows is written over it
  for (int64_t k = threadIdx.x; counts && k < C.K; k += blockDim.x) {
    const int64_t v = C.indices[row * C.K + k];
    if (v < 0 || v >= P.V) continue;
    T g = T(upstream[k]);
    if (addend) g += load_one<AnyType, T>(addend + bytes_to(P.teacher, v), P.teacher.dtype);
    store_one<AnyType>(walk.at.grad + bytes_to(P.grad, v), P.grad.dtype, g);
  }
}

}  // namespace fastkd::cuda
