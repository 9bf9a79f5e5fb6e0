// What pairs_tile.cuh and pairs_product.cuh do, in double: differences throughout, no tensor cores.
// Right rather than fast.
#pragma once
#include "cuda/pairs_tile.cuh"

namespace fastkd::cuda {

// Of pairs (y + 16 a, x + 16 b), a, b < 4, in the thread 16 y + x.
__device__ __forceinline__ void squared_distances(const PairsSide& side, PairsPlace place, char* stages, double* tile) {
  constexpr int kDepth = 16, kStride = kDepth + 1;
  const int x = threadIdx.x % 16, y = threadIdx.x / 16;
  const double* x_rows = reinterpret_cast<const double*>(side.rows);
  double* room = reinterpret_cast<double*>(stages);
  double sum[4][4] = {};
  for (int64_t d = 0; d < side.D_padded; d += kDepth) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 2 * kTile / 16; ++k) {
      const int row = y + 16 * k;
      const int64_t n = row < kTile ? place.i + row : place.j + row - kTile;
      room[row * kStride + x] = x_rows[n * side.D_padded + d + x];
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const double difference = room[(y + i / 4 * 16) * kStride + k] - room[(kTile + x + i % 4 * 16) * kStride + k];
        sum[i / 4][i % 4] += difference * difference;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int r = y + i / 4 * 16, c = x + i % 4 * 16;
    tile[r * kTileStride + c] = sum[i / 4][i % 4];
  }
  __syncthreads();
}

// sum_j w_ij (x_i - x_j) for 64 rows x 64 columns: 16 rows of one column a thread.
class DifferencesProduct {
 public:
  static constexpr int kSlice = 64;

  __device__ __forceinline__ DifferencesProduct(const PairsParams& P, int row_tile, int slice)
      : P_(P),
        i_(int64_t(row_tile) * kTile),
        column_(int64_t(slice) * kSlice + threadIdx.x % kSlice),
        used_(column_ < P.student.D_padded) {
    if (!used_) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) own_[r] = at(i_ + first_row() + r);
  }

  __device__ __forceinline__ static double rounded(double w) { return w; }
  __device__ __forceinline__ void near(const double*, int64_t, double*, int*) const {}

  // tile: w_ij, j from `j`.
  __device__ __forceinline__ void add(const double* tile, int64_t j, char*) {
    if (!used_) return;
    const double* weights = tile + first_row() * kTileStride;
    for (int n = 0; n < kTile; ++n) {
      const double x = at(j + n);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum_[r] += weights[r * kTileStride + n] * (own_[r] - x);
    }
  }
  __device__ __forceinline__ void store(const double*, const int*, double* partial) const {
    if (!used_) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) partial[(i_ + first_row() + r) * P_.student.D_padded + column_] = sum_[r];
  }

 private:
  static constexpr int kRows = kTile * kSlice / kPairsThreads;
  __device__ __forceinline__ int first_row() const { return threadIdx.x / kSlice * kRows; }
  __device__ __forceinline__ double at(int64_t n) const {
    return reinterpret_cast<const double*>(P_.student.rows)[n * P_.student.D_padded + column_];
  }

  const PairsParams& P_;
  int64_t i_, column_;
  bool used_;
  double own_[kRows] = {}, sum_[kRows] = {};
};

}  // namespace fastkd::cuda
