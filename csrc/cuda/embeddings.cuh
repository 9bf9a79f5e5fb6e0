// Embeddings as tiles want them: contiguous, padded, in one type, the column means subtracted where
// a Gram matrix in float would cancel, and the squared norms of the very values that are stored.
// Reads the embeddings once (twice with means), writes the copy.
#pragma once
#include "cuda/pairs_launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace fastkd::cuda {

inline constexpr int kMeansThreads = 512, kMeansColumns = 32;
inline constexpr int kCopyThreads = 256;

template <class T>
__device__ __forceinline__ T load_embedding(const Embeddings& x, int64_t n, int64_t d) {
  return load_one<AnyType, T>(x.at(n, d), x.dtype);
}

// grid: ceil(D_s / 32) blocks for the student, then the teacher's; block (32 columns, 16 rows at a time).
template <class T>
__global__ void __launch_bounds__(kMeansThreads)
    embeddings_means_kernel(const __grid_constant__ PairsSide student, const __grid_constant__ PairsSide teacher,
                            const int64_t* count, int64_t all) {
  const int64_t N = rows_there(count, 0, all);
  T(*room)[kMeansColumns + 1] = reinterpret_cast<T(*)[kMeansColumns + 1]>(ptx::dynamic_shared());
  const int64_t student_blocks = (student.source.D + kMeansColumns - 1) / kMeansColumns;
  const bool first = blockIdx.x < student_blocks;
  const PairsSide& side = first ? student : teacher;
  const int64_t d = (blockIdx.x - (first ? 0 : student_blocks)) * kMeansColumns + threadIdx.x;
  T sum = 0;
  if (d < side.source.D) {
#pragma unroll 4
    for (int64_t n = threadIdx.y; n < N; n += blockDim.y) sum += load_embedding<T>(side.source, n, d);
  }
  room[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  for (int c = threadIdx.y; c < kMeansColumns; c += blockDim.y) {  // a warp a column
    sum = warp_sum(threadIdx.x < blockDim.y ? room[threadIdx.x][c] : T(0));
    const int64_t column = d - threadIdx.x + c;
    if (threadIdx.x == 0 && column < side.source.D) side.means[column] = sum / double(N);
  }
}

// A warp a row. grid: N_padded / 8 blocks for the student, then as many for the teacher.
template <class S>
__global__ void __launch_bounds__(kCopyThreads)
    embeddings_copy_kernel(const __grid_constant__ PairsSide student, const __grid_constant__ PairsSide teacher,
                           const int64_t* count, int64_t all, int64_t N_padded) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = (int64_t(blockIdx.x) * kCopyThreads + threadIdx.x) / 32;
  const bool first = warp < N_padded;
  const PairsSide& side = first ? student : teacher;
  const int64_t n = first ? warp : warp - N_padded, N = rows_there(count, 0, all);
  if (n >= (N + kPairsTile - 1) / kPairsTile * kPairsTile) return;
  S* out = reinterpret_cast<S*>(side.rows) + n * side.D_padded;
  double norm = 0;
#pragma unroll 4
  for (int d = lane; d < int(side.D_padded); d += 32) {
    S x = narrow<S>(0.0f);
    if (n < N && d < side.source.D) {
      if constexpr (sizeof(S) == 2) {  // the source's own type
        x = *reinterpret_cast<const S*>(side.source.at(n, d));
      } else if constexpr (sizeof(S) == 4) {
        x = S(load_embedding<double>(side.source, n, d) - side.means[d]);
      } else {
        x = load_embedding<S>(side.source, n, d);
      }
    }
    out[d] = x;
    const double value = widen<double>(x);
    norm += value * value;
  }
  if (side.norms) {
    norm = warp_sum(norm);
    if (lane == 0) side.norms[n] = float(norm);
  }
}

inline cudaError_t embeddings_means(const PairsParams& P, cudaStream_t stream) {
  const auto blocks = [](const PairsSide& side) { return (side.source.D + kMeansColumns - 1) / kMeansColumns; };
  constexpr int64_t kRoom = kMeansThreads / kMeansColumns * (kMeansColumns + 1) * sizeof(double);
  return Launch(blocks(P.student) + blocks(P.teacher), dim3(kMeansColumns, kMeansThreads / kMeansColumns), kRoom,
                stream)(embeddings_means_kernel<double>, P.student, P.teacher, P.count, P.options.N);
}

template <class S>
cudaError_t embeddings_copy(const PairsParams& P, cudaStream_t stream) {
  const int64_t N_padded = P.tiles * kPairsTile;
  return Launch(2 * N_padded / (kCopyThreads / 32), dim3(kCopyThreads), 0, stream)(
      embeddings_copy_kernel<S>, P.student, P.teacher, P.count, P.options.N, N_padded);
}

}  // namespace fastkd::cuda
