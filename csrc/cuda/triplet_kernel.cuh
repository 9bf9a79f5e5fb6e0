// All triplets of the rows of a strip on the GPU.
//
//   a_j = margin + d_ij of the P positives, sorted; of a negative k the rank r_k = #{j: a_j <= d_ik}
//   loss_i = f sum_k (sum_{j >= r_k} a_j - (P - r_k) d_ik), f = weight_i / |neg(i)|
//   dL/dd_ik = -f (P - r_k), dL/dd_ij = f #{k: r_k <= j}, both over d are the weights of x_i - x_j
//
// A block a row, which stays in the caches: inner products are read, distances written, read and replaced by
// weights; 4 elements a pair, and a bit that says whether it is near. Thresholds are sorted in shared memory, as many
// as it has room for at a time; ranks are searched, their counts and the sums of thresholds make both gradients:
// O(N log P). Only where a row has more positives, a pair's triplets are counted in memory from one part to the next.
// Until ranks are known, the distances of positives are stored negated: the sign marks a positive.
//
// Near pairs, whose differences would cancel in a product with the strip, are added to the gradient from the rows as
// they were given: row i's in the row's own block, row j's by a warp a column in a second launch, which sets them to 0
// and adds up the sums of rows. No two blocks write to one place; no order depends on time. Nothing is saved.
#pragma once
#include <cmath>
#include <limits>

#include "cuda/reduce.cuh"
#include "cuda/triplet_launch.h"
#include "math/distance.h"
#include "math/scalar.h"

namespace fastkd::cuda {

inline constexpr int kTripletThreads = 256, kTripletWarps = kTripletThreads / 32;

// In shared memory; [room] each, the sums one more.
template <class T>
struct TripletRoom {
  static constexpr int64_t bytes(int64_t room) {
    return (room + 1 + 2 * kTripletWarps) * int64_t(sizeof(double)) + room * int64_t(sizeof(T) + 2 * sizeof(int32_t));
  }
  __device__ __forceinline__ explicit TripletRoom(int room) {
    of_block = reinterpret_cast<double*>(ptx::dynamic_shared());
    sums = of_block + 2 * kTripletWarps;
    thresholds = reinterpret_cast<T*>(sums + room + 1);
    samples = reinterpret_cast<int32_t*>(thresholds + room);
    of_rank = samples + room;
  }
  double* of_block;  // for two sums over the block
  double* sums;      // of the thresholds from each on
  T* thresholds;     // sorted
  int32_t* samples;  // whose they are
  int32_t* of_rank;  // how many negatives are of a rank; then of this rank or below
};

template <class T>
__device__ __forceinline__ T squared_distance(const T* x, const T* y, int D) {
  T sum = 0;
  for (int k = threadIdx.x % 32; k < D; k += 32) sum += (x[k] - y[k]) * (x[k] - y[k]);
  return warp_sum(sum);
}

// Distances in the place of inner products: infinity of what is no pair. Returns whether a pair of this thread is
// near.
template <class T>
__device__ __forceinline__ bool triplet_distances(const TripletParams<T>& P, int i, T* d) {
  const int self = P.row + i;
  const int lane = threadIdx.x % 32;
  const T norm = P.norms[self];
  const bool valid = P.valid[self];
  bool any = false;
  for (int first = threadIdx.x - lane; first < P.N; first += kTripletThreads) {
    const int j = first + lane;
    const bool pair = valid && j < P.N && j != self && P.valid[j];
    const T both = pair ? norm + P.norms[j] : T(0);
    T squared = pair ? both - 2 * d[j] : baseline::kInf<T>;
    const bool near = pair && squared < kNear<T> * both;
    const unsigned votes = __ballot_sync(0xffffffffu, near);
    for (unsigned rest = votes; rest; rest &= rest - 1) {
      const int from = __ffs(int(rest)) - 1;
      const T exact = squared_distance(P.x + P.sample_at(self), P.x + P.sample_at(first + from), P.D);
      if (lane == from) squared = exact;
    }
    if (j < P.N) d[j] = std::sqrt(squared < kMinSquaredDistance<T> ? kMinSquaredDistance<T> : squared);
    if (P.near && lane == 0) P.near_at(first)[i] = votes;
    any |= near;
  }
  return any;
}

// Makes the distances of positives negative. How many they are, over the block, and whether one of them is a NaN.
template <class T>
__device__ __forceinline__ int64_t take_positives(const TripletParams<T>& P, int self, T* d, double* room, bool& nans) {
  double found = 0;
  nans = false;
  for (int64_t p = P.first[self] + threadIdx.x; p < P.last[self]; p += kTripletThreads) {
    const int j = int(P.positives[p]);
    if (j == self || !P.valid[j]) continue;
    ++found;
    nans |= d[j] != d[j];
    d[j] = -d[j];
  }
  nans = __syncthreads_or(nans);
  return int64_t(block_sum<kTripletWarps>(found, room));
}

// The thresholds of positives p, p + 1, ..., sorted; behind them infinity. Returns how many they are.
template <class T>
__device__ __forceinline__ int sort_thresholds(const TripletParams<T>& P, int self, const T* d, int64_t p,
                                               const TripletRoom<T>& room) {
  constexpr int32_t kNone = 0x7fffffff;
  int found = 0;
  for (int at = threadIdx.x; at < P.room; at += kTripletThreads) {
    const int j = at + 1 < P.room && p + at < P.last[self] ? int(P.positives[p + at]) : self;
    const bool positive = j != self && P.valid[j];
    room.thresholds[at] = positive ? P.margin - d[j] : baseline::kInf<T>;
    room.samples[at] = positive ? j : kNone;
    found += positive;
  }
  const auto bitonic = [&](int size, int step) {
    __syncthreads();
    for (int n = threadIdx.x; n < P.room / 2; n += kTripletThreads) {
      const int at = n / step * 2 * step + n % step, other = at + step;
      const T a = room.thresholds[at], b = room.thresholds[other];
      const int i = room.samples[at], j = room.samples[other];
      const bool above = a > b || (a == b && i > j), up = (at & size) == 0;
      if (above != up) continue;
      room.thresholds[at] = b;
      room.thresholds[other] = a;
      room.samples[at] = j;
      room.samples[other] = i;
    }
  };
  for (int size = 2; size <= P.room; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) bitonic(size, step);
  }
  return int(block_sum<kTripletWarps>(double(found), room.of_block));  // whose barrier ends the sort as well
}

// Sums of the thresholds from each of `count` on, by the first warp.
template <class T>
__device__ __forceinline__ void sum_thresholds(const TripletRoom<T>& room, int size, int count) {
  const int own = (size + 31) / 32, begin = int(threadIdx.x) * own;
  double sum = 0;
  for (int p = begin; p < begin + own && p < count; ++p) sum += double(room.thresholds[p]);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const double more = __shfl_down_sync(0xffffffffu, sum, bit);
    sum += threadIdx.x + bit < 32 ? more : 0;
  }
  sum = __shfl_down_sync(0xffffffffu, sum, 1);
  if (threadIdx.x == 31) sum = 0;
  const int end = begin + own < size ? begin + own : size;
  if (threadIdx.x == 0) room.sums[size] = 0;
  for (int p = end - 1; p >= begin; --p) {
    sum += p < count ? double(room.thresholds[p]) : 0;
    room.sums[p] = sum;
  }
}

// Of counts those up to each, by the first warp.
__device__ __forceinline__ void sum_counts(int32_t* counts, int size) {
  const int own = (size + 31) / 32, begin = int(threadIdx.x) * own, end = begin + own < size ? begin + own : size;
  int32_t sum = 0;
  for (int p = begin; p < end; ++p) sum += counts[p];
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const int32_t more = __shfl_up_sync(0xffffffffu, sum, bit);
    sum += int(threadIdx.x) >= bit ? more : 0;
  }
  sum = __shfl_up_sync(0xffffffffu, sum, 1);
  if (threadIdx.x == 0) sum = 0;
  for (int p = begin; p < end; ++p) {
    sum += counts[p];
    counts[p] = sum;
  }
}

// How many thresholds are at most d; of a NaN none.
template <class T>
__device__ __forceinline__ int rank(const T* thresholds, int size, int count, T d) {
  int r = 0;
  for (int half = size / 2; half > 0; half /= 2) r += thresholds[r + half - 1] <= d ? half : 0;
  return r < count ? r : count;
}

// Of x_i - x_j, where n triplets are active; d: negative of a positive.
template <class T>
__device__ __forceinline__ T triplet_weight(T d, int n, T factor) {
  if (d <= kMinDistance<T> && d >= -kMinDistance<T>) return T(0);
  return -factor * T(n) / d;  // of a positive d has the other sign
}

// Row i's near pairs.
template <class T>
__device__ __forceinline__ void add_near(const TripletParams<T>& P, int i, const T* weights) {
  const int self = P.row + i;
  for (int first = 0; first < P.N; first += 32) {
    for (unsigned rest = P.near_at(first)[i]; rest; rest &= rest - 1) {
      const int j = first + __ffs(int(rest)) - 1;
      const T weight = weights[j];
      if (weight == 0) continue;
      for (int k = threadIdx.x; k < P.D; k += kTripletThreads) {
        P.grad[P.sample_at(self) + k] += weight * (P.x[P.sample_at(self) + k] - P.x[P.sample_at(j) + k]);
      }
    }
  }
}

// The triplets of a row that has some, of its distances d: adds them to the sums, and makes weights of them.
template <class T>
__device__ __forceinline__ void row_triplets(const TripletParams<T>& P, int i, T* d, T factor, double& loss,
                                             double& active) {
  const TripletRoom<T> room(P.room);
  const int self = P.row + i;
  const int64_t first = P.first[self], last = P.last[self];
  const int capacity = P.room - 1;
  const bool several = last - first > capacity, save = P.grad != nullptr;
  int32_t* triplets = P.triplets + P.row_at(i);
  int64_t above_all = 0;
  for (int64_t p = first; p < last; p += capacity) {
    const int found = sort_thresholds(P, self, d, p, room);
    for (int n = threadIdx.x; n < P.room; n += kTripletThreads) room.of_rank[n] = 0;
    if (threadIdx.x < 32) sum_thresholds(room, P.room, found);
    __syncthreads();
    for (int k = threadIdx.x; k < P.N; k += kTripletThreads) {
      const T distance = d[k];
      if (distance < 0) continue;
      const int r = rank(room.thresholds, P.room, found, distance), above = found - r;
      if (above > 0) {  // not 0 times the distance of what is infinitely far
        loss += room.sums[r] - double(above) * double(distance);
        above_all += above;
        if (save) atomicAdd(room.of_rank + r, 1);
      }
      if (save && several) triplets[k] = above + (p > first ? triplets[k] : 0);
      if (save && !several) d[k] = triplet_weight(distance, above, factor);
    }
    __syncthreads();
    if (!save) continue;
    if (threadIdx.x < 32) sum_counts(room.of_rank, P.room);
    __syncthreads();
    for (int n = threadIdx.x; n < found; n += kTripletThreads) {
      const int j = room.samples[n];
      if (several) {
        triplets[j] = room.of_rank[n];
      } else {
        d[j] = triplet_weight(d[j], room.of_rank[n], factor);
      }
    }
    __syncthreads();
  }
  active += double(above_all);
  if (!save || !several) return;
  for (int k = threadIdx.x; k < P.N; k += kTripletThreads) d[k] = triplet_weight(d[k], triplets[k], factor);
}

// A block a row.
template <class T>
__global__ void __launch_bounds__(kTripletThreads, 3) triplet_kernel(const __grid_constant__ TripletParams<T> P) {
  double* room = TripletRoom<T>(P.room).of_block;
  const int i = blockIdx.x, self = P.row + i;
  T* d = P.strip + P.row_at(i);
  const bool near = __syncthreads_or(triplet_distances(P, i, d));
  bool nans = false;
  const int64_t positives = take_positives(P, self, d, room, nans);
  const int64_t negatives = P.valid[self] ? *P.count - 1 - positives : 0;
  const bool some = positives > 0 && negatives > 0;
  double loss = 0, active = 0;
  if (some && !nans) {
    row_triplets(P, i, d, P.weight[self] / T(negatives), loss, active);
  } else {
    constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
    for (int k = threadIdx.x; k < P.N; k += kTripletThreads) d[k] = some ? kNaN : T(0);
    if (some) loss = double(kNaN);
    __syncthreads();  // the room's last sum has been read
  }
  loss = block_sum<kTripletWarps>(loss, room);
  active = block_sum<kTripletWarps>(active, room + kTripletWarps);
  if (threadIdx.x == 0) {
    P.row_sums[i] = some ? double(P.weight[self] / T(negatives)) * loss : 0;
    P.row_sums[int64_t(P.rows) + i] = active;
    P.row_sums[int64_t(2) * P.rows + i] = some ? double(positives) * double(negatives) : 0;
  }
  if (near && P.near) add_near(P, i, d);
}

// Near pairs of the sample of column j, a warp's; they are 0 then.
template <class T>
__device__ __forceinline__ void take_near(const TripletParams<T>& P, int j) {
  const int lane = threadIdx.x % 32;
  const uint32_t* near = P.near_at(j);
  const T* y = P.x + P.sample_at(j);
  T* grad = P.grad + P.sample_at(j);
  for (int first = 0; first < P.rows; first += 32) {
    const int i = first + lane;
    T weight = 0;
    if (i < P.rows && (near[i] >> j % 32 & 1)) {
      T* at = P.strip + P.row_at(i) + j;
      weight = *at;
      *at = 0;
    }
    for (unsigned rest = __ballot_sync(0xffffffffu, weight != 0); rest; rest &= rest - 1) {
      const int from = __ffs(int(rest)) - 1;
      const T of_pair = __shfl_sync(0xffffffffu, weight, from);
      const T* x = P.x + P.sample_at(P.row + first + from);
      for (int k = lane; k < P.D; k += 32) grad[k] -= of_pair * (x[k] - y[k]);
    }
  }
}

// A block 32 columns, where there is a gradient; the last one adds up the sums of the rows.
template <class T>
__global__ void __launch_bounds__(kTripletThreads) triplet_finish_kernel(const __grid_constant__ TripletParams<T> P) {
  if (blockIdx.x + 1 == gridDim.x) {
    double* room = reinterpret_cast<double*>(ptx::dynamic_shared());
    for (int n = 0; n < 3; ++n) {
      double sum = 0;
      for (int i = threadIdx.x; i < P.rows; i += kTripletThreads) sum += P.row_sums[int64_t(n) * P.rows + i];
      sum = block_sum<kTripletWarps>(sum, room + n * kTripletWarps);
      if (threadIdx.x == 0) P.sums[n] = sum;
    }
    return;
  }
  const int first = int(blockIdx.x) * 32;
  uint32_t any = 0;
  for (int i = threadIdx.x; i < P.rows; i += kTripletThreads) any |= P.near_at(first)[i];
  if (!__syncthreads_or(any != 0)) return;
  for (int j = first + int(threadIdx.x) / 32; j < first + 32 && j < P.N; j += kTripletWarps) take_near(P, j);
}

}  // namespace fastkd::cuda
