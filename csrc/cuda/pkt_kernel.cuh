// A strip of cosines on the GPU (math/pkt.h): of a pair both orders, from one similarity per side.
//
//   w_ij = c_i a_ij + c_j a_ji in the student's place; q_i += sum_j s_ij a_ij; loss += both orders' terms
//
// Pairs beyond the strip's own rows count in both orders, the others as each other's. One pass: the student's
// cosines are read and written once, the teacher's read once; 3 elements a pair. A warp has 128 columns of some rows:
// sums of columns stay in registers, those of rows are shuffled, and a second launch adds up both, 1/32 and 1/128 of
// a strip, in the order of the tiles. Nothing is saved.
#pragma once
#include "cuda/pkt_launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/pkt.h"

namespace fastkd::cuda {

inline constexpr int kPktThreads = 128, kPktSumThreads = 256;
inline constexpr int kPktOwn = kPktColumns / 32;  // columns of a lane

// kWide: every row begins 16-byte aligned, and a lane's columns lie next to each other.
template <class T, bool kWide>
struct PktLane {
  static constexpr int kWords = kPktOwn * int(sizeof(T)) / 16;

  __device__ __forceinline__ PktLane(int64_t tile, int64_t columns)
      : first(tile * kPktColumns + threadIdx.x % 32 * (kWide ? kPktOwn : 1)), columns(columns) {}
  __device__ __forceinline__ int64_t column(int k) const { return first + k * (kWide ? 1 : 32); }
  __device__ __forceinline__ bool there(int k) const { return column(kWide ? 0 : k) < columns; }

  // 0 where there is none
  template <Memory kMemory>
  __device__ __forceinline__ void load(const T* row, T (&v)[kPktOwn]) const {
    if constexpr (kWide) {
      union {
        uint4 words[kWords];
        T elements[kPktOwn];
      } raw = {};
      if (there(0)) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          raw.words[i] = load_16<kMemory>(reinterpret_cast<const char*>(row + first) + 16 * i);
        }
      }
#pragma unroll
      for (int k = 0; k < kPktOwn; ++k) v[k] = raw.elements[k];
    } else {
#pragma unroll
      for (int k = 0; k < kPktOwn; ++k) v[k] = there(k) ? row[column(k)] : T(0);
    }
  }
  __device__ __forceinline__ void store(T* row, const T (&v)[kPktOwn]) const {
    if constexpr (kWide) {
      union {
        uint4 words[kWords];
        T elements[kPktOwn];
      } raw = {};
#pragma unroll
      for (int k = 0; k < kPktOwn; ++k) raw.elements[k] = v[k];
      if (!there(0)) return;
#pragma unroll
      for (int i = 0; i < kWords; ++i) __stcg(reinterpret_cast<uint4*>(row + first) + i, raw.words[i]);
    } else {
#pragma unroll
      for (int k = 0; k < kPktOwn; ++k) {
        if (there(k)) row[column(k)] = v[k];
      }
    }
  }

  int64_t first, columns;
};

// A warp a tile.
template <class T, bool kWide>
__global__ void __launch_bounds__(kPktThreads) pkt_kernel(const __grid_constant__ PktParams<T> P) {
  const int64_t tile = (int64_t(blockIdx.x) * kPktThreads + threadIdx.x) / 32;
  if (tile >= P.row_tiles * P.column_tiles) return;
  const int64_t row_tile = tile / P.column_tiles, column_tile = tile % P.column_tiles;
  const PktLane<T, kWide> lane(column_tile, P.columns);
  const auto of_columns = [&](const T* x, T(&v)[kPktOwn]) {
#pragma unroll
    for (int k = 0; k < kPktOwn; ++k) v[k] = lane.there(k) ? x[lane.column(k)] : T(0);
  };
  T valid[kPktOwn], inverse[kPktOwn], teacher_inverse[kPktOwn], weight[kPktOwn], scale[kPktOwn];
  of_columns(P.valid, valid);
  of_columns(P.student_inverse, inverse);
  of_columns(P.teacher_inverse, teacher_inverse);
  of_columns(P.weight, weight);
  of_columns(P.scale, scale);

  T column_slopes[kPktOwn] = {};
  double loss = 0;
  const int64_t begin = row_tile * P.tile_rows;
  const int64_t end = begin + P.tile_rows < P.rows ? begin + P.tile_rows : P.rows;
  for (int64_t i = begin; i < end; ++i) {
    T s[kPktOwn], t[kPktOwn];
    lane.template load<Memory::kGlobal>(P.student + i * P.columns, s);
    lane.template load<Memory::kGlobalLast>(P.teacher + i * P.columns, t);
    const T valid_i = P.valid[i], inverse_i = P.student_inverse[i], teacher_inverse_i = P.teacher_inverse[i];
    const T weight_i = P.weight[i], scale_i = P.scale[i];
    T row_loss = 0, slope = 0;
#pragma unroll
    for (int k = 0; k < kPktOwn; ++k) {
      const T both = valid_i * valid[k];
      const T x = baseline::pkt_similarity(s[k], both), y = baseline::pkt_similarity(t[k], both);
      const T a = baseline::pkt_pair(x * inverse_i, y * teacher_inverse_i, P.eps, weight_i, row_loss, slope);
      T other_loss = 0, other_slope = 0;
      const T b = baseline::pkt_pair(x * inverse[k], y * teacher_inverse[k], P.eps, weight[k], other_loss, other_slope);
      const bool beyond = lane.column(k) >= P.rows;
      row_loss += beyond ? other_loss : T(0);
      column_slopes[k] += beyond ? other_slope : T(0);
      s[k] = scale_i * a + scale[k] * b;
    }
    lane.store(P.student + i * P.columns, s);
    loss += double(row_loss);
    slope = warp_sum(slope);
    if (threadIdx.x % 32 == 0) P.row_slopes[i * P.column_tiles + column_tile] = double(slope);
  }
#pragma unroll
  for (int k = 0; k < kPktOwn; ++k) {
    if (lane.there(k)) P.column_slopes[row_tile * P.columns + lane.column(k)] = double(column_slopes[k]);
  }
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0) P.losses[tile] = loss;
}

// A block has the slopes of 32 samples, the last one the loss.
template <class T>
__global__ void __launch_bounds__(kPktSumThreads) pkt_sum_kernel(const __grid_constant__ PktParams<T> P) {
  constexpr int kWarps = kPktSumThreads / 32;
  double* room = reinterpret_cast<double*>(ptx::dynamic_shared());  // [kWarps][33]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (blockIdx.x + 1 == gridDim.x) {
    double loss = 0;
    for (int64_t n = threadIdx.x; n < P.row_tiles * P.column_tiles; n += kPktSumThreads) loss += P.losses[n];
    loss = block_sum<kWarps>(loss, room);
    if (threadIdx.x == 0) *P.loss = loss;
    return;
  }
  const int64_t first = int64_t(blockIdx.x) * 32;
  double sum = 0;
  for (int64_t n = warp; n < P.row_tiles && first + lane < P.columns; n += kWarps) {
    sum += P.column_slopes[n * P.columns + first + lane];
  }
  room[warp * 33 + lane] = sum;
  __syncthreads();
  for (int c = warp; c < 32; c += kWarps) {
    const int64_t sample = first + c;
    sum = lane < kWarps ? room[lane * 33 + c] : 0;
    for (int64_t n = lane; n < P.column_tiles && sample < P.rows; n += 32) {
      sum += P.row_slopes[sample * P.column_tiles + n];
    }
    sum = warp_sum(sum);
    if (lane == 0 && sample < P.columns) P.slopes[sample] += sum;
  }
}

}  // namespace fastkd::cuda
