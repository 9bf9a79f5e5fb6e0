// Standardizes rows of logits on the GPU, and brings a gradient back through that: see fastkd/ops/standardize.py for
// the formulas. Threads share rows as they do in the rows schedule: those of a warp or more a row, or, where rows lie
// side by side, a lane each of 32 of them, whose classes several warps share. A row is read three times, forward, or
// twice.
//
// Each thread adds up what its classes lie beyond its first one, so that a row of equal classes is 0 exactly and one
// far from 0 keeps its digits; the mean is found once more from what is left beyond it.
#pragma once
#include "cuda/rows_lanes.cuh"
#include "cuda/standardize_launch.h"

namespace fastkd::cuda {

inline constexpr int kStandardizeThreads = 256;  // of a block, at most

// Two sums over the classes of a row.
struct MomentSums {
  double first, second;
  static __device__ MomentSums empty() { return {0, 0}; }
  static __device__ MomentSums combine(const MomentSums& x) { return {warp_sum(x.first), warp_sum(x.second)}; }
  static __device__ void merge(MomentSums& all, const MomentSums& other) {
    all.first += other.first;
    all.second += other.second;
  }
};
// The largest of the threads' first classes.
struct Largest {
  double value, unused;
  static __device__ Largest empty() { return {-kInf<double>, 0}; }
  static __device__ Largest combine(const Largest& x) { return {warp_max(x.value), 0}; }
  static __device__ void merge(Largest& all, const Largest& other) {
    all.value = other.value > all.value ? other.value : all.value;
  }
};
static_assert(sizeof(Largest) == sizeof(MomentSums));

template <int kCount, class T>
__device__ __forceinline__ void load_classes(const char* p, DType type, T (&v)[kCount]) {
  if constexpr (kCount == kPack) {
    load_pack<AnyType, Memory::kGlobal>(p, type, v);
  } else {
    v[0] = load_one<AnyType, T>(p, type);
  }
}
template <int kCount, class T>
__device__ __forceinline__ void store_classes(char* p, DType type, const T (&v)[kCount]) {
  if constexpr (kCount == kPack) {
    store_pack<AnyType>(p, type, v);
  } else {
    store_one<AnyType>(p, type, v[0]);
  }
}

// This thread's classes of its row. each(f): f(bytes from the row's begin to some classes, in each tensor; how many).
// block (threads of a row, rows)
template <class T>
struct RowWalk {
  const RowsParams<T>& P;
  int64_t row;
  bool exists;
  const RowLayout<AnyType, AnyType> at;

  template <class Params>
  __device__ RowWalk(const Params& S, int64_t, int64_t)
      : P(S.rows), row(int64_t(blockIdx.x) * blockDim.y + threadIdx.y), exists(row < P.N), at(P, exists ? row : 0) {
    row = exists ? row : 0;
  }
  __device__ bool leads() const { return threadIdx.x == 0; }
  template <class F>
  __device__ __forceinline__ void each(bool any, F&& f) const {
    for (int64_t i = threadIdx.x; any && i < at.edges; i += blockDim.x) {
      f(at.edge(i), std::integral_constant<int, 1>());
    }
    if constexpr (kInPacks<T>) {
      for (int64_t i = threadIdx.x; any && i < at.packs; i += blockDim.x) {
        f(at.pack(i), std::integral_constant<int, kPack>());
      }
    }
  }
  // room: of one combination, the which-th
  template <class X>
  __device__ __forceinline__ X combine(const X& own, int which) const {
    const int warps = blockDim.x / 32, block_warps = warps * blockDim.y;
    X* room = reinterpret_cast<X*>(ptx::dynamic_shared()) + which * (block_warps + 1);
    return combine_over_row(own, room, int(threadIdx.y) * warps, warps, block_warps);
  }
};

// block (32 rows, warps)
template <class T>
struct LaneWalk {
  const RowsParams<T>& P;
  const LaneRow<AnyType, AnyType> at;
  int64_t row;
  bool exists;

  __device__ LaneWalk(const StandardizeParams<T>& S, int64_t inner, int64_t in_run)
      : P(S.rows), at(P, inner, in_run), row(at.row), exists(at.exists) {}
  __device__ bool leads() const { return threadIdx.y == 0; }
  template <class F>
  __device__ __forceinline__ void each(bool any, F&& f) const {
    for (int64_t v = threadIdx.y; any && v < P.V; v += blockDim.y) f(v, std::integral_constant<int, 1>());
  }
  template <class X>
  __device__ __forceinline__ X combine(const X& own, int which) const {
    X* room = reinterpret_cast<X*>(ptx::dynamic_shared()) + which * 32 * blockDim.y;
    return over_warps(own, room, [](X& all, const X& other) { X::merge(all, other); });
  }
};

__device__ __forceinline__ int64_t bytes_to(const RowsTensor& x, int64_t v) { return v * x.stride_v * x.element_size; }

template <class T>
__device__ __forceinline__ bool is_class(T x) {
  return !(x == -kInf<T>);  // NaN is one
}

// See RowMoments: the mean as a value of T and what lies between.
template <class T>
struct StandardizeScale {
  T mean, rest, inverse, curvature;
  __device__ explicit StandardizeScale(const RowMoments& m)
      : mean(T(m.mean)), rest(T(m.mean - double(mean))), inverse(T(m.inverse())), curvature(T(m.curvature())) {}
  __device__ __forceinline__ T centred(T x) const { return (x - mean) - rest; }
};

template <class T, class Walk>
__global__ void __launch_bounds__(kStandardizeThreads, 1)
    standardize_fwd_kernel(const __grid_constant__ StandardizeParams<T> S, int64_t inner, int64_t in_run) {
  const RowsParams<T>& P = S.rows;
  const Walk walk(S, inner, in_run);
  const bool counts = walk.exists && (!P.mask || P.mask[walk.row]);  // nothing is read of a row that is masked out
  const char* x = walk.at.student;
  char* out = walk.at.grad;

  T base = -kInf<T>, sum = 0, count = 0;
  walk.each(counts, [&](int64_t v, auto n) {
    T s[n.value];
    load_classes<n.value>(x + bytes_to(P.student, v), P.student.dtype, s);
#pragma unroll
    for (int i = 0; i < n.value; ++i) {
      base = is_class(base) ? base : s[i];
      sum += is_class(s[i]) ? s[i] - base : T(0);
      count += is_class(s[i]) ? T(1) : T(0);
    }
  });
  const double largest = walk.combine(Largest{double(base), 0}, 0).value;
  const double beyond = count > T(0) ? double(count) * (double(base) - largest) + double(sum) : 0.0;
  const MomentSums sums = walk.combine(MomentSums{beyond, double(count)}, 1);
  const T mean = T(sums.second > 0 ? largest + sums.first / sums.second : 0.0);

  T left = 0, squares = 0;
  walk.each(counts, [&](int64_t v, auto n) {
    T s[n.value];
    load_classes<n.value>(x + bytes_to(P.student, v), P.student.dtype, s);
#pragma unroll
    for (int i = 0; i < n.value; ++i) {
      const T d = is_class(s[i]) ? s[i] - mean : T(0);
      left += d;
      squares += d * d;
    }
  });
  const MomentSums second = walk.combine(MomentSums{double(left), double(squares)}, 2);
  const double rest = sums.second > 0 ? second.first / sums.second : 0.0;
  const double variance = (second.second - second.first * rest) / (sums.second > 1 ? sums.second - 1 : 1.0);
  // rounding may leave less than nothing; NaN stays
  const double deviation = sums.second > 1 ? sqrt(variance < 0 ? 0.0 : variance) : variance * 0;
  const RowMoments moments{double(mean) + rest, deviation, sums.second};
  if (counts && S.moments && walk.leads()) S.moments[walk.row] = moments;

  const StandardizeScale<T> k(moments);
  walk.each(counts, [&](int64_t v, auto n) {
    T s[n.value];
    load_classes<n.value>(x + bytes_to(P.student, v), P.student.dtype, s);
#pragma unroll
    for (int i = 0; i < n.value; ++i) s[i] = is_class(s[i]) ? k.centred(s[i]) * k.inverse : s[i];
    store_classes<n.value>(out + bytes_to(P.grad, v), P.grad.dtype, s);
  });
}

template <class T, class Walk>
__global__ void __launch_bounds__(kStandardizeThreads, 1)
    standardize_bwd_kernel(const __grid_constant__ StandardizeParams<T> S, int64_t inner, int64_t in_run) {
  const RowsParams<T>& P = S.rows;
  const Walk walk(S, inner, in_run);
  const bool counts = walk.exists && (!P.mask || P.mask[walk.row]);
  const char *x = walk.at.student, *upstream = walk.at.teacher;
  const char* addend = S.addend ? S.addend + (upstream - P.teacher.data) : nullptr;
  const RowMoments moments = counts ? S.moments[walk.row] : RowMoments{};
  const StandardizeScale<T> k(moments);

  T sum = 0, product = 0;
  walk.each(counts, [&](int64_t v, auto n) {
    T s[n.value], g[n.value];
    load_classes<n.value>(x + bytes_to(P.student, v), P.student.dtype, s);
    load_classes<n.value>(upstream + bytes_to(P.teacher, v), P.teacher.dtype, g);
#pragma unroll
    for (int i = 0; i < n.value; ++i) {
      if (!is_class(s[i])) continue;
      sum += g[i];
      product += g[i] * k.centred(s[i]);
    }
  });
  const MomentSums sums = walk.combine(MomentSums{double(sum), double(product)}, 0);
  const T mean = T(sums.first / moments.count), slope = T(sums.second * moments.curvature());
  const bool zero = !counts || moments.deviation == 0;

  walk.each(walk.exists, [&](int64_t v, auto n) {
    T s[n.value] = {}, g[n.value] = {}, more[n.value] = {};
    if (!zero) {
      load_classes<n.value>(x + bytes_to(P.student, v), P.student.dtype, s);
      load_classes<n.value>(upstream + bytes_to(P.teacher, v), P.teacher.dtype, g);
    }
    if (addend && counts) load_classes<n.value>(addend + bytes_to(P.teacher, v), P.teacher.dtype, more);
#pragma unroll
    for (int i = 0; i < n.value; ++i) {
      const T z = ((g[i] - mean) - k.centred(s[i]) * slope) * k.inverse;
      more[i] += zero || !is_class(s[i]) ? T(0) : z;
    }
    store_classes<n.value>(walk.at.grad + bytes_to(P.grad, v), P.grad.dtype, more);
  });
}

}  // namespace fastkd::cuda
