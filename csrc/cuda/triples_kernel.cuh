// rkd_angle on the GPU: with D = d^2 and q = 1 / d (0 for equal rows) of two rows, the cosine at the
// vertex a is psi_aik = q_ai q_ak (D_ai + D_ak - D_ik) / 2, and
//   loss = 1 / N^3 sum_aik huber(e), e = psi_aik(student) - psi_aik(teacher), r = clamp(e, -delta, delta)
//   gamma_ai = sum_k r (q_ak - q_ai psi_aik)      as of the vertex a: N^3 triples
//   K_ik = sum_a r q_ai q_ak                      as of the edge i k: symmetric, half of them
//   W_ij = 2 / N^3 (q_ij (gamma_ij + gamma_ji) - K_ij),   grad_i = sum_j W_ij (x_i - x_j)
//
// Fused: r is never stored. Blocks of rows A <= J are taken with each block L, and for them are kept
// the distances [A, J], [A, L], [J, L] and the sums [A, J]: where N rows are one block, each distance
// is computed once; else again for every third block, 2 D operations beside some 15 block.
// One launch, two roles of a block of threads: a tile of gamma over some k in L, or a tile of K, with
// the loss, over some vertices a in L. Both keep their pairs in registers and walk along L through
// shared memory. Each r is evaluated 1.5 times (1.5 x 6 operations, beside 4 for clamp and sum):
// nothing is reduced between threads but the loss. About 16 operations a triple; bytes do not matter.
//
// Where D_ai ~ D_ik >> D_ak, (D_ai - D_ik) cancels: float distances do up to a spread of kSpread.
// Beyond it `careful` is set, and a distance is a float and its remainder. A pair of tiles is then
// two halves: more registers a pair.
//
// Sums: fp32 over one block's part of L, those added in one order; the loss in double after each
// kChunk. Saved for backward: the gradient.
#pragma once
#include "cuda/triples_distances.cuh"

namespace fastkd::cuda {

template <class T>
struct TriplesTask {
  Distances<T> aj, al, jl;
  int tiles_a, tiles_j;    // of kTriplesTile rows
  int depth, part, parts;  // columns of L; of them to a block, a multiple of kChunk; how many of those
  int pitch;
  bool diagonal;  // A is J
  bool add;       // to what an earlier L left
  bool gradient;
  T delta;
  T* gamma[2];         // [parts, pitch, pitch], at vertices of A and of J
  T* edges;            // K, [parts, pitch, pitch]; of a diagonal the upper tiles
  double* loss;        // [edge blocks]
  const int* careful;  // []; of floats alone
};

inline constexpr int kTriplesThreads = 256, kChunk = 16;
inline constexpr int kThreadsAside = 16;  // along each side of a tile

template <class T>
__host__ __device__ constexpr int64_t triples_shared_bytes() {  // the larger of edge_tile's
  return kChunk * (sizeof(T) == 4 ? (32 + 64) * 6 * sizeof(float) : (32 + 64) * 4 * sizeof(double));
}

__device__ __forceinline__ float clamp(float x, float bound) { return ptx::clamp(x, bound); }
__device__ __forceinline__ double clamp(double x, double bound) { return x < -bound ? -bound : x > bound ? bound : x; }

// A distance, as an operand or a constant of the innermost loops.
template <class T, bool kCareful>
struct Length {
  T half, inverse;
};
template <class T>
struct Length<T, true> {
  T half, inverse, low;
};

enum class Operand {
  kHalf,    // half alone
  kBoth,    // and the inverse
  kScaled,  // and half stands for half * inverse, unless it is careful
};

// kChunk columns of kRows rows of the distances, transposed, in shared memory: [2, arrays, kChunk, kRows].
template <class T, int kRows, Operand kWhat, bool kCareful>
struct Chunk {
  static constexpr bool kInverse = kWhat != Operand::kHalf;
  static constexpr int kStride = kRows * kChunk, kSide = (1 + kInverse + kCareful) * kStride;
  static constexpr int kSize = 2 * kSide;
  T* shared;

  __device__ __forceinline__ void stage(const Distances<T>& from, int pitch, int row, int column) const {
    constexpr int kCount = kStride / kTriplesThreads;
    const int r = threadIdx.x % kRows, c = threadIdx.x / kRows * kCount;
    const int source = (row + r) * pitch + column + c;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      T half[kCount], inverse[kCount], low[kCount];
      load_neighbours(from.half[side] + source, half);
      if constexpr (kInverse) load_neighbours(from.inverse[side] + source, inverse);
      if constexpr (kCareful) load_neighbours(from.low[side] + source, low);
      T* at = shared + side * kSide + c * kRows + r;
#pragma unroll
      for (int n = 0; n < kCount; ++n, at += kRows) {
        at[0] = kWhat == Operand::kScaled && !kCareful ? half[n] * inverse[n] : half[n];
        if constexpr (kInverse) at[kStride] = inverse[n];
        if constexpr (kCareful) at[(1 + kInverse) * kStride] = low[n];
      }
    }
  }
  template <int n>
  __device__ __forceinline__ void load(int side, int column, int row, Length<T, kCareful> (&x)[n]) const {
    const T* at = shared + side * kSide + column * kRows + row;
    T v[n];
    load_neighbours(at, v);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i].half = v[i];
    if constexpr (kInverse) {
      load_neighbours(at + kStride, v);
#pragma unroll
      for (int i = 0; i < n; ++i) x[i].inverse = v[i];
    }
    if constexpr (kCareful) {
      load_neighbours(at + (1 + kInverse) * kStride, v);
#pragma unroll
      for (int i = 0; i < n; ++i) x[i].low = v[i];
    }
  }
};

template <bool kCareful, class T>
__device__ __forceinline__ Length<T, kCareful> load_length(const Distances<T>& from, int side, int at) {
  Length<T, kCareful> x;
  x.half = from.half[side][at];
  x.inverse = from.inverse[side][at];
  if constexpr (kCareful) x.low = from.low[side][at];
  return x;
}

// psi_aik / q_ai. The two that may be large and nearly equal are subtracted first: that is exact.
template <class T>
__device__ __forceinline__ T projection(const Length<T, false>& ai, const Length<T, false>& ak,
                                        const Length<T, false>& ik) {
  return (ai.half - ik.half) * ak.inverse + ak.half;
}
__device__ __forceinline__ float projection(const Length<float, true>& ai, const Length<float, true>& ak,
                                            const Length<float, true>& ik) {
  float difference, rest;
  two_sum(ai.half, -ik.half, difference, rest);
  return ((difference + ak.half) + (rest + ((ai.low - ik.low) + ak.low))) * ak.inverse;
}

// gamma at the vertices of `rows`, a tile of 16 kA of them by 64 others, for columns [begin, end) of L.
//   step_a, step_i  where in P.aj the distance of a pair is
template <class T, bool kCareful, int kA>
__device__ __forceinline__ void vertex_tile(const TriplesTask<T>& P, const Distances<T>& rows,
                                            const Distances<T>& others, int step_a, int step_i, int a0, int i0,
                                            int begin, int end, T* gamma) {
  constexpr int kI = 4;
  using Rows = Chunk<T, kA * kThreadsAside, Operand::kScaled, kCareful>;
  const Rows near{reinterpret_cast<T*>(ptx::dynamic_shared())};
  const Chunk<T, kI * kThreadsAside, Operand::kHalf, kCareful> far{near.shared + Rows::kSize};
  const int a_of_tile = threadIdx.x / kThreadsAside * kA, i_of_tile = threadIdx.x % kThreadsAside * kI;
  Length<T, kCareful> pair[2][kA][kI];
  T sum[kA][kI] = {};
#pragma unroll
  for (int n = 0; n < 2 * kA * kI; ++n) {
    const int side = n / (kA * kI), a = n / kI % kA, i = n % kI;
    pair[side][a][i] = load_length<kCareful>(P.aj, side, (a0 + a_of_tile + a) * step_a + (i0 + i_of_tile + i) * step_i);
  }
  for (int column = begin; column < end; column += kChunk) {
    __syncthreads();
    near.stage(rows, P.pitch, a0, column);
    far.stage(others, P.pitch, i0, column);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kChunk; ++k) {
      Length<T, kCareful> ak[2][kA], ik[2][kI];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        near.load(side, k, a_of_tile, ak[side]);
        far.load(side, k, i_of_tile, ik[side]);
      }
#pragma unroll
      for (int n = 0; n < kA * kI; ++n) {
        const int a = n / kI, i = n % kI;
        const T q = pair[0][a][i].inverse, psi = q * projection(pair[0][a][i], ak[0][a], ik[0][i]);
        const T e = psi - pair[1][a][i].inverse * projection(pair[1][a][i], ak[1][a], ik[1][i]);
        sum[a][i] += clamp(e, P.delta) * (ak[0][a].inverse - q * psi);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kA * kI; ++n) {
    T& at = gamma[(a0 + a_of_tile + n / kI) * P.pitch + i0 + i_of_tile + n % kI];
    at = P.add ? at + sum[n / kI][n % kI] : sum[n / kI][n % kI];
  }
}

// K of a tile of 16 kI rows of A by 64 of J, for columns [begin, end) of L. Returns this thread's loss.
template <class T, bool kCareful, int kI>
__device__ __forceinline__ double edge_tile(const TriplesTask<T>& P, int i0, int k0, int begin, int end, T* edges) {
  constexpr int kK = 4;
  using Rows = Chunk<T, kI * kThreadsAside, Operand::kBoth, kCareful>;
  const Rows left{reinterpret_cast<T*>(ptx::dynamic_shared())};
  const Chunk<T, kK * kThreadsAside, Operand::kScaled, kCareful> right{left.shared + Rows::kSize};
  const int i_of_tile = threadIdx.x / kThreadsAside * kI, k_of_tile = threadIdx.x % kThreadsAside * kK;
  const int first = (i0 + i_of_tile) * P.pitch + k0 + k_of_tile;
  Length<T, kCareful> pair[2][kI][kK];
  T sum[kI][kK] = {};
  double loss = 0;
#pragma unroll
  for (int n = 0; n < 2 * kI * kK; ++n) {
    const int side = n / (kI * kK), i = n / kK % kI, k = n % kK;
    pair[side][i][k] = load_length<kCareful>(P.aj, side, first + i * P.pitch + k);
  }
  for (int column = begin; column < end; column += kChunk) {
    __syncthreads();
    left.stage(P.al, P.pitch, i0, column);
    right.stage(P.jl, P.pitch, k0, column);
    __syncthreads();
    T part[kK] = {};
#pragma unroll 1
    for (int a = 0; a < kChunk; ++a) {
      Length<T, kCareful> ai[2][kI], ak[2][kK];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        left.load(side, a, i_of_tile, ai[side]);
        right.load(side, a, k_of_tile, ak[side]);
      }
#pragma unroll
      for (int n = 0; n < kI * kK; ++n) {
        const int i = n / kK, k = n % kK;
        const T psi = ai[0][i].inverse * projection(ai[0][i], ak[0][k], pair[0][i][k]);
        const T e = psi - ai[1][i].inverse * projection(ai[1][i], ak[1][k], pair[1][i][k]);
        const T r = clamp(e, P.delta);
        part[k] += r * (e - r / 2);
        sum[i][k] += r * (ai[0][i].inverse * ak[0][k].inverse);
      }
    }
    loss += double((part[0] + part[1]) + (part[2] + part[3]));
  }
#pragma unroll
  for (int n = 0; n < kI * kK; ++n) {
    T& at = edges[first + n / kK * P.pitch + n % kK];
    at = P.add ? at + sum[n / kK][n % kK] : sum[n / kK][n % kK];
  }
  return loss;
}

// What a block of threads does: one part of L, for one tile.
struct TriplesWork {
  bool edges, of_j;  // else vertices, of A or of J
  int number, part;  // of the edge blocks
  TilePlace tile;
};
template <class T>
__device__ __forceinline__ TriplesWork triples_work(const TriplesTask<T>& P) {
  TriplesWork w{};
  const int tiles = P.tiles_a * P.tiles_j, vertices = P.gradient ? tiles * P.parts : 0;
  w.number = int(blockIdx.x);
  w.of_j = !P.diagonal && w.number >= vertices && w.number < 2 * vertices;
  w.edges = !w.of_j && w.number >= vertices;
  if (w.of_j) w.number -= vertices;
  if (w.edges) w.number -= P.diagonal ? vertices : 2 * vertices;
  const int tile = w.number / P.parts, columns = w.of_j ? P.tiles_a : P.tiles_j;
  w.part = w.number % P.parts;
  w.tile = w.edges && P.diagonal ? triangle_tile(tile, columns) : TilePlace{tile / columns, tile % columns};
  return w;
}

// `half`: of a tile that is taken in two.
template <bool kCareful, int kRows, class T>
__device__ __forceinline__ double triples_tile(const TriplesTask<T>& P, const TriplesWork& w, int half) {
  const int row = w.tile.row * kTriplesTile + half * kRows * kThreadsAside, column = w.tile.column * kTriplesTile;
  const int begin = w.part * P.part, last = begin + P.part, end = last < P.depth ? last : P.depth;
  const int64_t room = int64_t(w.part) * P.pitch * P.pitch;
  if (w.edges) return edge_tile<T, kCareful, kRows>(P, row, column, begin, end, P.edges + room);
  const Distances<T>&rows = w.of_j ? P.jl : P.al, &others = w.of_j ? P.al : P.jl;
  vertex_tile<T, kCareful, kRows>(P, rows, others, w.of_j ? 1 : P.pitch, w.of_j ? P.pitch : 1, row, column, begin, end,
                                  P.gamma[w.of_j] + room);
  return 0;
}

template <class T>
__global__ void __launch_bounds__(kTriplesThreads, sizeof(T) == 4 ? 2 : 1) triples_kernel(const __grid_constant__ TriplesTask<T> P) {
  const TriplesWork w = triples_work(P);
  double loss = 0;
  bool halves = sizeof(T) == 8;
  if constexpr (sizeof(T) == 4) halves = *P.careful;
  if (halves) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) loss += triples_tile<sizeof(T) == 4, 2>(P, w, half);
  } else if constexpr (sizeof(T) == 4) {
    loss = triples_tile<false, 4>(P, w, 0);
  }
  if (!w.edges) return;
  loss = warp_sum(loss);
  double* room = reinterpret_cast<double*>(ptx::dynamic_shared());
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x) return;
  loss = 0;
  for (int warp = 0; warp < kTriplesThreads / 32; ++warp) loss += room[warp];
  if (!P.diagonal || w.tile.row != w.tile.column) loss *= 2;  // for (k, i)
  P.loss[w.number] = P.add ? P.loss[w.number] + loss : loss;
}

}  // namespace fastkd::cuda
