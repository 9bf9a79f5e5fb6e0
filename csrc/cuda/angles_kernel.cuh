// rkd_angle on the GPU: with D = d^2 and q = 1 / d (0 for equal rows) of two rows, the cosine at the
// vertex a is psi_aik = q_ai q_ak (D_ai + D_ak - D_ik) / 2, and
//   loss = 1 / N^3 sum_aik huber(e), e = psi_aik(student) - psi_aik(teacher), r = clamp(e, -delta, delta)
//   gamma_ai = sum_k r (q_ak - q_ai psi_aik)      as of the vertex a: N^3 triples
//   K_ik = sum_a r q_ai q_ak                      as of the edge i k: symmetric, half of them
//   W_ij = 2 / N^3 (q_ij (gamma_ij + gamma_ji) - K_ij),   grad_i = sum_j W_ij (x_i - x_j)
//
// Fused: r is never stored. Blocks of rows A <= J are taken with each block L, and for them are kept
// the distances [A, J], [A, L], [J, L] and the sums [A, J]: where N rows are one block, each distance
// is computed once; else again for every third block, 8 D instructions beside 35 times a block's rows.
// One launch, two roles of a block of threads: a tile of gamma over some k in L, or a tile of K, with
// the loss, over some vertices a in L. Both keep their pairs in registers and walk along L through
// shared memory; nothing is reduced between threads but the loss. Instructions a triple: 11 for
// gamma, 13 for K at half of the triples: 17.4, which is what takes the time. The bytes do not.
//
// Where D_ai ~ D_ik >> D_ak, (D_ai - D_ik) cancels: float distances do up to a spread of kSpread.
// Beyond it `careful` is set, a distance is a float and its remainder, and a tile is taken in two
// halves, since a pair then takes more registers.
//
// Sums: fp32 over one block's part of L, those added in one order; the loss in double after each
// kChunk. Saved for backward: the gradient.
#pragma once
#include <type_traits>

#include "cuda/angles_distances.cuh"

namespace fastkd::cuda {

template <class T>
struct AnglesTask {
  Distances<T> aj, al, jl;
  int tiles_a, tiles_j;               // of kAnglesTile rows
  int64_t first_a, first_j, first_l;  // rows of the embeddings
  const int64_t* count;               // of the rows that are there, or null
  int depth, part, parts;             // columns of L; of them to a block, a multiple of kChunk; how many of those
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

inline constexpr int kAnglesThreads = 256, kChunk = 16;
inline constexpr int kThreadsAside = 16;  // along each side of a tile

// Of the operands in shared memory: the larger, edge_tile's.
template <class T>
__host__ __device__ constexpr int64_t angles_chunk_bytes() {
  return int64_t(sizeof(T)) * kChunk * (sizeof(T) == 4 ? 6 * (32 + 64) : 4 * (32 + 64));
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

// n neighbours, 8 or 16 bytes at a time, of what no thread of this launch writes.
template <class T, int n>
__device__ __forceinline__ void load_read_only(const T* p, T (&v)[n]) {
  using Words = std::conditional_t<n * sizeof(T) % 16 == 0, uint4, uint2>;
  union {
    Words words[n * sizeof(T) / sizeof(Words)];
    T elements[n];
  } raw;
#pragma unroll
  for (int i = 0; i < int(n * sizeof(T) / sizeof(Words)); ++i)
    raw.words[i] = __ldg(reinterpret_cast<const Words*>(p) + i);
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = raw.elements[i];
}

// kChunk columns of kRows rows of the distances, transposed, in shared memory: [2, arrays, kChunk, kRows].
template <class T, int kRows, Operand kWhat, bool kCareful>
struct Chunk {
  static constexpr bool kInverse = kWhat != Operand::kHalf;
  static constexpr int kStride = kRows * kChunk, kSide = (1 + kInverse + kCareful) * kStride;
  static constexpr int kSize = 2 * kSide;
  T* shared;

  __device__ __forceinline__ void stage(const Distances<T>& from, int pitch, int row, int column) const {
    constexpr int kCount = kStride / kAnglesThreads;
    const int r = threadIdx.x % kRows, c = threadIdx.x / kRows * kCount;
    const int source = (row + r) * pitch + column + c;
    T half[2][kCount], inverse[2][kCount], low[2][kCount];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      load_read_only(from.half[side] + source, half[side]);
      if constexpr (kInverse) load_read_only(from.inverse[side] + source, inverse[side]);
      if constexpr (kCareful) load_read_only(from.low[side] + source, low[side]);
    }
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n) {
      const int side = n / kCount, i = n % kCount;
      T* at = shared + side * kSide + (c + i) * kRows + r;
      at[0] = kWhat == Operand::kScaled && !kCareful ? half[side][i] * inverse[side][i] : half[side][i];
      if constexpr (kInverse) at[kStride] = inverse[side][i];
      if constexpr (kCareful) at[(1 + kInverse) * kStride] = low[side][i];
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

// What a block of threads does: one part of L, for one tile, or for half of one. It lies in shared
// memory: registers are for the pairs.
template <class T>
struct AnglesWork {
  bool edges, of_j;            // else vertices, of A or of J
  bool off_diagonal;           // the tile stands for its transpose as well
  int row, column;             // of the sums
  int begin, end;              // columns of L
  int step_row, step_column;   // where in aj the distance of a pair is
  Distances<T> rows, columns;  // to L
  T* out;                      // [pitch, pitch]
  double* loss;
};
template <class T>
__device__ __forceinline__ AnglesWork<T> angles_work(const AnglesTask<T>& P) {
  AnglesWork<T> w{};
  const int tiles = P.tiles_a * P.tiles_j, vertices = P.gradient ? tiles * P.parts : 0;
  int number = int(blockIdx.x);
  w.of_j = !P.diagonal && number >= vertices && number < 2 * vertices;
  w.edges = !w.of_j && number >= vertices;
  if (w.of_j) number -= vertices;
  if (w.edges) number -= P.diagonal ? vertices : 2 * vertices;
  const int tile = number / P.parts, part = number % P.parts, across = w.of_j ? P.tiles_a : P.tiles_j;
  const TilePlace at = w.edges && P.diagonal ? triangle_tile(tile, across) : TilePlace{tile / across, tile % across};
  w.off_diagonal = !P.diagonal || at.row != at.column;
  w.row = at.row * kAnglesTile;
  w.column = at.column * kAnglesTile;
  w.begin = part * P.part;
  const int64_t rows = rows_there(P.count, w.of_j ? P.first_j : P.first_a, w.row + 1);
  const int64_t columns = rows_there(P.count, w.of_j ? P.first_a : P.first_j, w.column + 1);
  const bool empty = rows <= w.row || columns <= w.column;
  const int depth = empty ? 0 : int(rows_there(P.count, P.first_l, P.depth));
  w.end = w.begin + P.part < depth ? w.begin + P.part : depth;
  w.step_row = w.of_j ? 1 : P.pitch;
  w.step_column = w.of_j ? P.pitch : 1;
  w.rows = w.of_j ? P.jl : P.al;
  w.columns = w.of_j ? P.al : P.jl;
  w.out = (w.edges ? P.edges : P.gamma[w.of_j]) + int64_t(part) * P.pitch * P.pitch;
  w.loss = P.loss + number;
  return w;
}

// A thread's pairs: kRows by 4 of them, 16 threads along each side of a tile.
template <class T, bool kCareful, int kRows>
struct Pairs {
  static constexpr int kColumns = 4, kCount = kRows * kColumns;
  Length<T, kCareful> pair[2][kRows][kColumns];  // of student, teacher
  T sum[kRows][kColumns];

  static __device__ __forceinline__ int row() { return threadIdx.x / kThreadsAside * kRows; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kThreadsAside * kColumns; }

  __device__ __forceinline__ void load(const AnglesTask<T>& P, const AnglesWork<T>& w) {
    const int step = w.step_row, step_column = w.step_column;
    const int first = (w.row + row()) * step + (w.column + column()) * step_column;
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n) {
      const int side = n / kCount, r = n / kColumns % kRows, c = n % kColumns, at = first + r * step + c * step_column;
      pair[side][r][c].half = P.aj.half[side][at];
      pair[side][r][c].inverse = P.aj.inverse[side][at];
      if constexpr (kCareful) pair[side][r][c].low = P.aj.low[side][at];
      sum[r][c] = 0;
    }
  }
  __device__ __forceinline__ void store(const AnglesTask<T>& P, const AnglesWork<T>& w) const {
    T* out = w.out + (w.row + row()) * P.pitch + w.column + column();
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      T& at = out[n / kColumns * P.pitch + n % kColumns];
      at = P.add ? at + sum[n / kColumns][n % kColumns] : sum[n / kColumns][n % kColumns];
    }
  }
};

// gamma of a tile: vertices by others.
template <class T, bool kCareful, int kRows>
__device__ __forceinline__ void vertex_tile(const AnglesTask<T>& P, const AnglesWork<T>& w) {
  using Tile = Pairs<T, kCareful, kRows>;
  using Vertices = Chunk<T, kRows * kThreadsAside, Operand::kScaled, kCareful>;
  const Vertices vertices{reinterpret_cast<T*>(ptx::dynamic_shared())};
  const Chunk<T, kAnglesTile, Operand::kHalf, kCareful> others{vertices.shared + Vertices::kSize};
  Tile t;
  t.load(P, w);
  for (int column = w.begin; column < w.end; column += kChunk) {
    __syncthreads();
    vertices.stage(w.rows, P.pitch, w.row, column);
    others.stage(w.columns, P.pitch, w.column, column);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < kChunk; ++k) {
      Length<T, kCareful> ak[2][kRows], ik[2][Tile::kColumns];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        vertices.load(side, k, Tile::row(), ak[side]);
        others.load(side, k, Tile::column(), ik[side]);
      }
#pragma unroll
      for (int n = 0; n < Tile::kCount; ++n) {
        const int a = n / Tile::kColumns, i = n % Tile::kColumns;
        const T q = t.pair[0][a][i].inverse, psi = q * projection(t.pair[0][a][i], ak[0][a], ik[0][i]);
        const T e = psi - t.pair[1][a][i].inverse * projection(t.pair[1][a][i], ak[1][a], ik[1][i]);
        t.sum[a][i] += clamp(e, P.delta) * (ak[0][a].inverse - q * psi);
      }
    }
  }
  t.store(P, w);
}

// K of a tile. Returns this thread's loss.
template <class T, bool kCareful, int kRows>
__device__ __forceinline__ double edge_tile(const AnglesTask<T>& P, const AnglesWork<T>& w) {
  using Tile = Pairs<T, kCareful, kRows>;
  using Rows = Chunk<T, kRows * kThreadsAside, Operand::kBoth, kCareful>;
  const Rows left{reinterpret_cast<T*>(ptx::dynamic_shared())};
  const Chunk<T, kAnglesTile, Operand::kScaled, kCareful> right{left.shared + Rows::kSize};
  Tile t;
  t.load(P, w);
  double loss = 0;
  for (int column = w.begin; column < w.end; column += kChunk) {
    __syncthreads();
    left.stage(w.rows, P.pitch, w.row, column);
    right.stage(w.columns, P.pitch, w.column, column);
    __syncthreads();
    T part[Tile::kColumns] = {};
#pragma unroll 1
    for (int a = 0; a < kChunk; ++a) {
      Length<T, kCareful> ai[2][kRows], ak[2][Tile::kColumns];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        left.load(side, a, Tile::row(), ai[side]);
        right.load(side, a, Tile::column(), ak[side]);
      }
#pragma unroll
      for (int n = 0; n < Tile::kCount; ++n) {
        const int i = n / Tile::kColumns, k = n % Tile::kColumns;
        const T psi = ai[0][i].inverse * projection(ai[0][i], ak[0][k], t.pair[0][i][k]);
        const T e = psi - ai[1][i].inverse * projection(ai[1][i], ak[1][k], t.pair[1][i][k]);
        const T r = clamp(e, P.delta);
        part[k] += r * (e - r / 2);
        t.sum[i][k] += r * (ai[0][i].inverse * ak[0][k].inverse);
      }
    }
    loss += double((part[0] + part[1]) + (part[2] + part[3]));
  }
  t.store(P, w);
  return loss;
}

template <bool kCareful, int kRows, class T>
__device__ __forceinline__ double angles_tile(const AnglesTask<T>& P, const AnglesWork<T>& w) {
  if (w.edges) return edge_tile<T, kCareful, kRows>(P, w);
  vertex_tile<T, kCareful, kRows>(P, w);
  return 0;
}

template <class T>
__global__ void __launch_bounds__(kAnglesThreads, sizeof(T) == 4 ? 2 : 1)
    angles_kernel(const __grid_constant__ AnglesTask<T> P) {
  AnglesWork<T>& w = *reinterpret_cast<AnglesWork<T>*>(ptx::dynamic_shared() + angles_chunk_bytes<T>());
  if (threadIdx.x == 0) w = angles_work(P);
  __syncthreads();
  double loss = 0;
  bool halves = sizeof(T) == 8;
  if constexpr (sizeof(T) == 4) halves = *P.careful;
  if (halves) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      loss += angles_tile<sizeof(T) == 4, 2>(P, w);
      __syncthreads();
      if (threadIdx.x == 0) w.row += 2 * kThreadsAside;
      __syncthreads();
    }
  } else if constexpr (sizeof(T) == 4) {
    loss = angles_tile<false, 4>(P, w);
  }
  if (!w.edges) return;
  __syncthreads();  // before the operands' memory is written
  loss = block_sum<kAnglesThreads / 32>(loss, reinterpret_cast<double*>(ptx::dynamic_shared()));
  if (threadIdx.x) return;
  if (w.off_diagonal) loss *= 2;
  *w.loss = P.add ? *w.loss + loss : loss;
}

}  // namespace fastkd::cuda
