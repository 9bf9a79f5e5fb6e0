// Distances between two blocks of rows, of student and teacher, in the form in which the triples
// need them: half of d^2, and 1 / d.
//
// Sums of (x - y)^2 of the given values: a difference is right to half an ulp of itself wherever the
// rows lie, so there is no mean to subtract, equal rows give exactly 0, and near ones are as exact
// as far ones. Squares are added in fp32 over kDepth features, then as a float and its remainder.
//
// Where the squared distances spread over more than kSpread, the cosines cancel (angles_kernel.cuh)
// and those sums are made in double, rounded to two floats. Which it is, is decided in memory.
#pragma once
#include <cmath>

#include "common/embeddings_params.h"
#include "cuda/angles_launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/distance.h"

namespace fastkd::cuda {

// Between the rows of two blocks, [pitch, pitch], for student and teacher; 0 outside of them, and where
// no rows are: nothing comes of those.
template <class T>
struct Distances {
  T* half[2];     // d^2 / 2
  T* low[2];      // what of it the rounding to T has left: of floats alone
  T* inverse[2];  // 1 / d; 0 where d is
};

enum class DistancesMode {
  kScan,     // in T, and notes their spread
  kRefine,   // once more, where the spread that was noted asks for it; says so in `careful`
  kDecided,  // as `careful` says
};

template <class T>
struct DistancesTask {
  Embeddings x[2];           // student, teacher
  int64_t first_i, first_j;  // rows of the embeddings
  int rows, columns, pitch;
  const int64_t* count;  // of the rows that are there, or null
  bool mirror;           // one block with itself: a tile is computed once, and written twice
  bool add;              // to the spread that was noted before
  DistancesMode mode;
  Distances<T> out;
  T* spread;     // [2, slots, 2]: largest d^2, largest 1 / d^2
  int slots;     // at least the tiles of one of the two
  int* careful;  // []
};

inline constexpr int kDistanceTile = 32, kDistanceThreads = 128, kDepth = 32;
inline constexpr int kDistancePitch = kDistanceTile + 4;  // of a feature in shared memory, in elements
inline constexpr float kSpread = 1024;

// Row and column of the number-th tile of the upper triangle, row by row.
struct TilePlace {
  int row, column;
};
__device__ __forceinline__ TilePlace triangle_tile(int number, int columns) {
  int row = 0;
  for (; number >= columns - row; ++row) number -= columns - row;
  return {row, row + number};
}

// a + b = sum + rest, exactly.
__device__ __forceinline__ void two_sum(float a, float b, float& sum, float& rest) {
  sum = a + b;
  const float added = sum - a;
  rest = (a - (sum - added)) + (b - added);
}

// n neighbours, in accesses of up to 16 bytes.
template <class T, int n>
__device__ __forceinline__ void load_neighbours(const T* p, T (&v)[n]) {
  constexpr int kCount = n * sizeof(T) > 16 ? 16 / int(sizeof(T)) : n;
  struct alignas(kCount * sizeof(T)) Some {
    T v[kCount];
  };
#pragma unroll
  for (int i = 0; i < n / kCount; ++i) {
    const Some some = reinterpret_cast<const Some*>(p)[i];
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[i * kCount + k] = some.v[k];
  }
}

// kDepth features of a tile's rows, transposed: shared[feature * kDistancePitch + row].
template <class C>
__device__ __forceinline__ void stage_features(C* shared, const Embeddings& x, int64_t first, int rows, int64_t depth) {
  const int feature = threadIdx.x % kDepth, row0 = threadIdx.x / kDepth;
  constexpr int kStep = kDistanceThreads / kDepth;
  const bool inside = depth + feature < x.D;
  with_type<AnyType, C>(x.dtype, [&](auto storage) {
    using From = decltype(storage);
    const From* at = reinterpret_cast<const From*>(x.at(first + row0, depth + feature));
#pragma unroll
    for (int n = 0; n < kDistanceTile / kStep; ++n) {
      const int row = row0 + n * kStep;
      shared[feature * kDistancePitch + row] = inside && row < rows ? widen<C>(at[n * kStep * x.stride_n]) : C(0);
    }
  });
}

// d^2 of this thread's pairs [2, 4], as sum + rest.
template <class C>
__device__ __forceinline__ void squared_distances(const Embeddings& x, int64_t i, int rows, int64_t j, int columns,
                                                  C (&sum)[2][4], C (&rest)[2][4]) {
  C* left = reinterpret_cast<C*>(ptx::dynamic_shared());
  C* right = left + kDepth * kDistancePitch;
  const int column = threadIdx.x % 8 * 4, row = threadIdx.x / 8 * 2;
  const bool any = rows > 0 && columns > 0;
  for (int64_t depth = 0; any && depth < x.D; depth += kDepth) {
    __syncthreads();
    stage_features(left, x, i, rows, depth);
    stage_features(right, x, j, columns, depth);
    __syncthreads();
    C part[2][4] = {};
#pragma unroll 8
    for (int d = 0; d < kDepth; ++d) {
      C a[2], b[4];
      load_neighbours(left + d * kDistancePitch + row, a);
      load_neighbours(right + d * kDistancePitch + column, b);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const C difference = a[n / 4] - b[n % 4];
        part[n / 4][n % 4] += difference * difference;
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      C &s = sum[n / 4][n % 4], p = part[n / 4][n % 4];
      if constexpr (sizeof(C) == 4) {
        float more;
        two_sum(s, p, s, more);
        rest[n / 4][n % 4] += more;
      } else {
        s += p;
      }
    }
  }
}

// 1 / sqrt(x), to an ulp.
__device__ __forceinline__ float inverse_root(float x) {
  const float y = rsqrtf(x);
  return y + y * (0.5f - 0.5f * (x * y) * y);
}
__device__ __forceinline__ double inverse_root(double x) { return 1 / std::sqrt(x); }

// One tile of one of the two, in C. Returns the largest d^2 and 1 / d^2 of this thread's pairs.
template <class T, class C>
__device__ __forceinline__ void distance_tile(const DistancesTask<T>& P, int which, TilePlace tile, T& most, T& least) {
  const int i0 = tile.row * kDistanceTile, j0 = tile.column * kDistanceTile;
  C sum[2][4] = {}, rest[2][4] = {};
  const int rows = int(rows_there(P.count, P.first_i, P.rows)),
            columns = int(rows_there(P.count, P.first_j, P.columns));
  squared_distances(P.x[which], P.first_i + i0, rows - i0, P.first_j + j0, columns - j0, sum, rest);
  const int i = i0 + threadIdx.x / 8 * 2, j = j0 + threadIdx.x % 8 * 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int row = i + n / 4, column = j + n % 4;
    const bool inside = row < rows && column < columns;
    const C d2 = inside ? sum[n / 4][n % 4] + rest[n / 4][n % 4] : C(0);
    const T rounded = T(d2), inverse = rounded < T(kMinSquaredLength) ? T(0) : inverse_root(rounded);
    const T low = inside ? T((sum[n / 4][n % 4] - C(rounded)) + rest[n / 4][n % 4]) / 2 : T(0);
    most = rounded > most ? rounded : most;
    least = inverse * inverse > least ? inverse * inverse : least;
    const auto write = [&](int at) {
      P.out.half[which][at] = rounded / 2;
      if (sizeof(T) == 4) P.out.low[which][at] = low;
      P.out.inverse[which][at] = inverse;
    };
    write(row * P.pitch + column);
    if (P.mirror && tile.row != tile.column) write(column * P.pitch + row);
  }
}

// The largest of both, over the block.
template <class T>
__device__ __forceinline__ void block_max(T& x, T& y) {
  constexpr int kWarps = kDistanceThreads / 32;
  T* room = reinterpret_cast<T*>(ptx::dynamic_shared());
  x = warp_max(x);
  y = warp_max(y);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    room[threadIdx.x / 32] = x;
    room[kWarps + threadIdx.x / 32] = y;
  }
  __syncthreads();
  x = warp_max(room[threadIdx.x % kWarps]);
  y = warp_max(room[kWarps + threadIdx.x % kWarps]);
  __syncthreads();
}

template <class T>
__device__ __forceinline__ bool spread_is_large(const T* spread, int slots) {
  bool large = false;
  for (int which = 0; which < 2; ++which) {
    T most = 0, least = 0;
    for (int slot = threadIdx.x; slot < slots; slot += kDistanceThreads) {
      const T *at = spread + (which * slots + slot) * 2, x = at[0], y = at[1];
      most = x > most ? x : most;
      least = y > least ? y : least;
    }
    block_max(most, least);
    large = large || most * least > T(kSpread);
  }
  return large;
}

// A block a tile, of the student and then of the teacher.
template <class T>
__global__ void __launch_bounds__(kDistanceThreads)
    angles_distances_kernel(const __grid_constant__ DistancesTask<T> P, int columns) {
  const int tiles = gridDim.x / 2, which = blockIdx.x / tiles, number = blockIdx.x % tiles;
  const TilePlace tile = P.mirror ? triangle_tile(number, columns) : TilePlace{number / columns, number % columns};
  T most = 0, least = 0;
  if constexpr (sizeof(T) == 4) {
    bool careful = false;
    if (P.mode == DistancesMode::kRefine) {
      careful = spread_is_large(P.spread, P.slots);
      if (blockIdx.x == 0 && threadIdx.x == 0) *P.careful = careful;
      if (!careful) return;
    }
    if (P.mode == DistancesMode::kDecided) careful = *P.careful;
    if (careful) return distance_tile<T, double>(P, which, tile, most, least);
  }
  distance_tile<T, T>(P, which, tile, most, least);
  if (sizeof(T) == 8 || P.mode != DistancesMode::kScan) return;
  block_max(most, least);
  if (threadIdx.x) return;
  T* at = P.spread + (which * P.slots + number) * 2;
  at[0] = P.add && at[0] > most ? at[0] : most;
  at[1] = P.add && at[1] > least ? at[1] : least;
}

}  // namespace fastkd::cuda
