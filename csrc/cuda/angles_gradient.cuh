// What follows the triples (angles_kernel.cuh): their sums put together to the loss and to W [A, J],
// and W's part of the gradient,
//   grad_i += sum_j W_ij (x_i - x_j)
// over differences of the given values: (diag(W 1) - W) X would cancel where the rows are near each
// other and far from the origin. Traffic: the parts of the sums, W and D / 64 times W.
#pragma once
#include "cuda/angles_kernel.cuh"

namespace fastkd::cuda {

template <class T>
struct WeightsTask {
  AnglesTask<T> triples;
  int64_t N;
  double weight;
  int loss_blocks;   // of triples.loss
  bool first, last;  // pair of blocks
  double* total;     // []: sum of the losses of the pairs of blocks so far
  T* loss;           // []
  T* weights;        // W, [pitch, pitch]
};

inline constexpr int kWeightsTile = 32, kWeightsThreads = 256;

// The first block adds up the loss, another makes a tile of W.
template <class T>
__global__ void __launch_bounds__(kWeightsThreads)
    angles_weights_kernel(const __grid_constant__ WeightsTask<T> P, int columns) {
  const AnglesTask<T>& S = P.triples;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const double N = double(rows_there(S.count, 0, P.N)), mean = N == 0 ? 0 : P.weight / (N * N * N);
  if (blockIdx.x == 0) {
    double x = 0;
    for (int n = threadIdx.x; n < P.loss_blocks; n += kWeightsThreads) x += S.loss[n];
    x = block_sum<kWeightsThreads / 32>(x, reinterpret_cast<double*>(ptx::dynamic_shared()));
    if (threadIdx.x) return;
    if (!P.first) x += *P.total;
    *P.total = x;
    if (P.last) *P.loss = T(x * mean);
    return;
  }
  const int i0 = (blockIdx.x - 1) / columns * kWeightsTile, j0 = (blockIdx.x - 1) % columns * kWeightsTile;
  constexpr int kPitch = kWeightsTile + 1;
  T* gamma = reinterpret_cast<T*>(ptx::dynamic_shared());  // at the vertices of J, [j, i]
  T* edges = gamma + kWeightsTile * kPitch;                // K of a lower tile, [j, i]
  const bool mirrored = S.diagonal && i0 / kAnglesTile > j0 / kAnglesTile;
  const int64_t part = int64_t(S.pitch) * S.pitch;
  for (int row = warp; row < kWeightsTile; row += kWeightsThreads / 32) {
    const int at = (j0 + row) * S.pitch + i0 + lane;
    T g = 0, k = 0;
    for (int n = 0; n < S.parts; ++n) {
      g += S.gamma[!S.diagonal][n * part + at];
      if (mirrored) k += S.edges[n * part + at];
    }
    gamma[row * kPitch + lane] = g;
    edges[row * kPitch + lane] = k;
  }
  __syncthreads();
  for (int row = warp; row < kWeightsTile; row += kWeightsThreads / 32) {
    const int at = (i0 + row) * S.pitch + j0 + lane;
    T g = gamma[lane * kPitch + row], k = edges[lane * kPitch + row];
    for (int n = 0; n < S.parts; ++n) {
      g += S.gamma[0][n * part + at];
      if (!mirrored) k += S.edges[n * part + at];
    }
    P.weights[at] = T(2 * mean) * (S.aj.inverse[0][at] * g - k);
  }
}

template <class T>
struct GradientTask {
  Embeddings x;  // the student, [N, D_s]
  T* grad;       // [N, D_s]
  const T* weights;
  int pitch;
  bool transposed;             // rows of J get what A's give them
  bool add;                    // to the gradient
  int64_t first, first_other;  // rows of the embeddings: that get a gradient, and those that give it
  int rows, others;
  const int64_t* count;  // of the rows that are there, or null
};

inline constexpr int kGradientThreads = 128, kGradientRows = 32, kGradientFeatures = 64, kOthers = 32;
inline constexpr int kGradientPitch = kGradientRows + 4;

template <class T>
constexpr int64_t gradient_shared_bytes() {
  return kOthers * (kGradientPitch + kGradientFeatures) * int64_t(sizeof(T));
}

// kOthers rows of W and of X; 0 where there are none.
template <class T>
__device__ __forceinline__ void stage_others(const GradientTask<T>& P, T* weights, T* features, int i0, int j0,
                                             int64_t d0) {
#pragma unroll 4
  for (int n = threadIdx.x; n < kOthers * kGradientRows; n += kGradientThreads) {
    const int low = n % 32, high = n / 32, i = P.transposed ? low : high, j = P.transposed ? high : low;
    const int at = P.transposed ? (j0 + j) * P.pitch + i0 + i : (i0 + i) * P.pitch + j0 + j;
    weights[j * kGradientPitch + i] = P.weights[at];
  }
  with_type<AnyType, T>(P.x.dtype, [&](auto storage) {
    using From = decltype(storage);
    const int d = threadIdx.x % kGradientFeatures, j = threadIdx.x / kGradientFeatures;
    constexpr int kStep = kGradientThreads / kGradientFeatures;
    const From* at = reinterpret_cast<const From*>(P.x.at(P.first_other + j0 + j, d0 + d));
    const bool inside = d0 + d < P.x.D;
#pragma unroll 8
    for (int n = 0; n < kOthers / kStep; ++n) {
      const bool valid = inside && j0 + j + n * kStep < P.others;
      features[(j + n * kStep) * kGradientFeatures + d] = valid ? widen<T>(at[n * kStep * P.x.stride_n]) : T(0);
    }
  });
}

// A block a tile of rows and features.
template <class T>
__global__ void __launch_bounds__(kGradientThreads)
    angles_gradient_kernel(const __grid_constant__ GradientTask<T> P, int columns) {
  const int i0 = blockIdx.x / columns * kGradientRows;
  const int64_t d0 = int64_t(blockIdx.x % columns) * kGradientFeatures;
  T* weights = reinterpret_cast<T*>(ptx::dynamic_shared());
  T* features = weights + kOthers * kGradientPitch;
  const int i_of_tile = threadIdx.x / 16 * 4, d_of_tile = threadIdx.x % 16 * 4;
  T own[4][4], sum[4][4] = {};
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int i = i0 + i_of_tile + n / 4;
    const int64_t d = d0 + d_of_tile + n % 4;
    own[n / 4][n % 4] = i < P.rows && d < P.x.D ? load_one<AnyType, T>(P.x.at(P.first + i, d), P.x.dtype) : T(0);
  }
  const bool any = rows_there(P.count, P.first, P.rows) > i0;
  const int others = any ? int(rows_there(P.count, P.first_other, P.others)) : 0;
  for (int j0 = 0; j0 < others; j0 += kOthers) {
    __syncthreads();
    stage_others(P, weights, features, i0, j0, d0);
    __syncthreads();
    T part[4][4] = {};
#pragma unroll 4
    for (int j = 0; j < kOthers; ++j) {
      T w[4], x[4];
      load_neighbours(weights + j * kGradientPitch + i_of_tile, w);
      load_neighbours(features + j * kGradientFeatures + d_of_tile, x);
#pragma unroll
      for (int n = 0; n < 16; ++n) part[n / 4][n % 4] += w[n / 4] * (own[n / 4][n % 4] - x[n % 4]);
    }
#pragma unroll
    for (int n = 0; n < 16; ++n) sum[n / 4][n % 4] += part[n / 4][n % 4];
  }
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int i = i0 + i_of_tile + n / 4;
    const int64_t d = d0 + d_of_tile + n % 4;
    if (i >= P.rows || d >= P.x.D) continue;
    T& at = P.grad[(P.first + i) * P.x.D + d];
    at = P.add ? at + sum[n / 4][n % 4] : sum[n / 4][n % 4];
  }
}

}  // namespace fastkd::cuda
