// The rows that a block has at hand: whose they are among its threads, and sums over them.
#pragma once
#include "cuda/features_memory.cuh"

namespace fastkd::cuda {

// A product that is not fused with a sum: of equal rows the difference is 0.
__device__ __forceinline__ float product(float a, float b) {
#if defined(__CUDACC__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double product(double a, double b) {
#if defined(__CUDACC__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

template <class T, class K>
struct BlockRows {
  static constexpr int kRows = K::kRows, kPacks = K::template kKept<T>;

  const FeaturesPart<T>& layer;
  const Sharers by;
  double* const room;  // of the block's sums, [sums, warps, rows]

  __device__ __forceinline__ BlockRows(const FeaturesPart<T>& layer, double* room)
      : layer(layer), by(layer, kRows), room(room) {}

  __device__ __forceinline__ bool counts(int64_t row) const {
    return row < layer.N && (!layer.mask || layer.mask[row]);
  }
  __device__ __forceinline__ int part() const { return kPacks * by.threads; }  // packs that are kept at a time

  // Sum i: adds up the lanes of each row, and what they gave before; to be followed by a barrier.
  template <class A>
  __device__ __forceinline__ void give(int i, A (&sum)[kRows], bool first) const {
#pragma unroll 1
    for (int bit = by.first_bit; bit < by.end_bit; bit *= 2) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) sum[q] += __shfl_xor_sync(0xffffffffu, sum[q], bit);
    }
    double* of_row = room + (i * by.warps + threadIdx.x / 32 % by.warps) * by.rows + by.row;
    for (int q = 0; by.leads && q < kRows; ++q) of_row[q] = (first ? 0 : of_row[q]) + double(sum[q]);
  }
  // And the warps: sum i of a row.
  __device__ __forceinline__ double take(int i, int row) const {
    double sum = 0;
    for (int w = 0; w < by.warps; ++w) sum += room[(i * by.warps + w) * by.rows + row];
    return sum;
  }

  // This thread's rows of those that the block has at hand.
  struct Place {
    int64_t row;
    int packs;
    RowPointers at;
    bool exists, any;  // any: a row that counts
    bool here[kRows];

    __device__ __forceinline__ Place(const BlockRows& rows, int64_t first)
        : row(first + rows.by.row), at(rows.layer, row < rows.layer.N ? row : 0), any(false) {
      const FeaturesPart<T>& layer = rows.layer;
      exists = row < layer.N;
      const int64_t left = exists ? layer.all_packs - row * layer.packs : 0;
      packs = left < layer.packs ? int(left) : layer.packs;
#pragma unroll
      for (int q = 0; q < kRows; ++q) any |= here[q] = rows.counts(row + q);
    }
    // How many packs of the row are in the part that begins there.
    __device__ __forceinline__ int end(int begin, int most) const {
      const int left = packs - begin;
      return left < most ? left : most;
    }
  };
};

}  // namespace fastkd::cuda
