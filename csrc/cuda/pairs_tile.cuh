// A tile of 64 x 64 squared distances on the tensor cores: |x|^2 + |y|^2 - 2 x y, the Gram tile from
// rows that arrive in shared memory by asynchronous copies, three stages deep. Products are those
// of bfloat16 and float16 as they are; of float, split into two tf32 (3xTF32), with sums in
// registers that are rounded to nearest, which the tensor cores' own are not.
//
// Where this cancels, d^2 < kNearTensorCores (|x|^2 + |y|^2), a warp sums the squares of the differences of the
// embeddings themselves, and the pair's distance is stored with a minus sign: it is near, and the
// gradient takes it apart as well.
#pragma once
#include "cuda/embeddings.cuh"
#include "cuda/mma.cuh"
#include "math/distance.h"

namespace fastkd::cuda {

inline constexpr int kTile = kPairsTile;
inline constexpr int kPairsThreads = 256, kPairsWarps = kPairsThreads / 32;
inline constexpr int kTileStride = kTile + 4;  // no two of 8 rows x 4 columns in one bank
inline constexpr int kStages = 3;
inline constexpr int kChunkBytes = 128, kChunkStride = kChunkBytes + 16;
inline constexpr int kStageBytes = 2 * kTile * kChunkStride;

// The rows that are there; none where they are too few for a pair.
struct PairsRows {
  int64_t N;
  int tiles;

  explicit __device__ __forceinline__ PairsRows(const PairsParams& P) : N(rows_there(P.count, 0, P.options.N)) {
    if (N < 2) N = 0;
    tiles = int((N + kTile - 1) / kTile);
  }
  __device__ __forceinline__ RelationOptions options(const PairsParams& P) const {
    return {P.options.delta, P.options.normalize, N};
  }
};

// Shared memory of every kernel that walks tiles. What is the same for all threads is here: registers are
// what they are short of.
template <class T>
struct PairsRoom {
  T student[kTile * kTileStride], teacher[kTile * kTileStride];
  double sums[4][kPairsWarps];
  double row_sums[kTile];
  int touched[kPairsWarps];
  PairsRows rows;
  double relation[8];  // a functor
  char stages[sizeof(T) == 8 ? 2 * kTile * 17 * 8 : kStages * kStageBytes];
};
static_assert(sizeof(PairsRoom<float>) <= 99 << 10 && sizeof(PairsRoom<double>) <= 99 << 10);

template <PairsStorage kStorage>
struct PairsTypes;
#define FASTKD_TYPE(name, type)              \
  template <>                                \
  struct PairsTypes<PairsStorage::k##name> { \
    using Storage = type;                    \
  };                                         \
  template <>                                \
  inline constexpr PairsStorage kStorageOf<type> = PairsStorage::k##name;
template <class S>
inline constexpr PairsStorage kStorageOf = PairsStorage::kDouble;
FASTKD_TYPE(BFloat16, __nv_bfloat16)
FASTKD_TYPE(Half, __half)
FASTKD_TYPE(Float, float)
FASTKD_TYPE(Double, double)
#undef FASTKD_TYPE

struct PairsPlace {
  int64_t i, j;  // the first row and column
};

// In 64 bits: from how many rows of the tile there are, ptxas makes masks ahead, and spills.
__device__ __forceinline__ bool is_pair(const PairsRows& rows, int64_t i, int64_t j) {
  return i < rows.N && j < rows.N && i != j;
}

// A float as the sum of two tf32, to 2^-22 of it.
struct Split {
  uint32_t high, low;
  explicit __device__ __forceinline__ Split(float x) : high(ptx::to_tf32(x)) {
    low = ptx::to_tf32(x - __uint_as_float(high));
  }
};

// d += a b in 3xTF32.
struct SplitA {
  uint32_t high[4], low[4];
  __device__ __forceinline__ SplitA() {}
  __device__ __forceinline__ void set(int i, float x) {
    const Split s(x);
    high[i] = s.high;
    low[i] = s.low;
  }
};
__device__ __forceinline__ void mma_split(float (&d)[4], const SplitA& a, const Split& b0, const Split& b1) {
  ptx::mma_tf32(d, a.low, b0.high, b1.high);
  ptx::mma_tf32(d, a.high, b0.low, b1.low);
  ptx::mma_tf32(d, a.high, b0.high, b1.high);
}

// 64 rows from row i and 64 from row j, 128 bytes of each.
__device__ __forceinline__ void copy_chunk(const PairsSide& side, int64_t row_bytes, PairsPlace place, int64_t chunk,
                                           char* stage) {
#pragma unroll
  for (int k = 0; k < 2 * kTile * kChunkBytes / 16 / kPairsThreads; ++k) {
    const int word = threadIdx.x + k * kPairsThreads, row = word / 8, at = word % 8 * 16;
    const int64_t n = row < kTile ? place.i + row : place.j + row - kTile;
    ptx::copy_async_16(stage + row * kChunkStride + at, side.rows + n * row_bytes + chunk * kChunkBytes + at);
  }
}

// The part of the Gram tile that a warp holds: 32 rows x 16 columns.
using GramPart = float[2][2][4];

template <class S>
__device__ __forceinline__ void gram_chunk(const char* stage, int row, int column, GramPart& gram) {
  const int lane = threadIdx.x % 32;
  const char* at_a = stage + (row + lane % 16) * kChunkStride + lane / 16 * 16;
  const char* at_b = stage + (kTile + column + lane % 8 + lane / 16 * 8) * kChunkStride + lane / 8 % 2 * 16;
  GramPart zero = {};
  GramPart& part = sizeof(S) == 4 ? zero : gram;
#pragma unroll
  for (int step = 0; step < kChunkBytes / 32; ++step) {
    uint32_t a[2][4], b[4];
    ptx::ldmatrix_x4(a[0], at_a + step * 32);
    ptx::ldmatrix_x4(a[1], at_a + 16 * kChunkStride + step * 32);
    ptx::ldmatrix_x4(b, at_b + step * 32);
    if constexpr (sizeof(S) == 4) {
      SplitA split[2];
#pragma unroll
      for (int i = 0; i < 8; ++i) split[i / 4].set(i % 4, __uint_as_float(a[i / 4][i % 4]));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Split b0(__uint_as_float(b[2 * n])), b1(__uint_as_float(b[2 * n + 1]));
        mma_split(part[0][n], split[0], b0, b1);
        mma_split(part[1][n], split[1], b0, b1);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<S, __half>) {
          ptx::mma_f16(part[i / 2][i % 2], a[i / 2], b[i % 2 * 2], b[i % 2 * 2 + 1]);
        } else {
          ptx::mma_bf16(part[i / 2][i % 2], a[i / 2], b[i % 2 * 2], b[i % 2 * 2 + 1]);
        }
      }
    }
  }
  if constexpr (sizeof(S) == 4) {
#pragma unroll
    for (int i = 0; i < 16; ++i) gram[i / 8][i / 4 % 2][i % 4] += part[i / 8][i / 4 % 2][i % 4];
  }
}

// By all lanes of a warp.
template <class S>
__device__ __forceinline__ float direct_squared(const Embeddings& x, int64_t i, int64_t j) {
  using Source = std::conditional_t<sizeof(S) == 4, AnyType, S>;
  float sum = 0;
#pragma unroll 1
  for (int64_t d = threadIdx.x % 32; d < x.D; d += 32) {
    const float difference =
        load_one<Source, float>(x.at(i, d), x.dtype) - load_one<Source, float>(x.at(j, d), x.dtype);
    sum += difference * difference;
  }
  return warp_sum(sum);
}

// f(row of the tile, column) by a whole warp, for all values of its 8 rows that are wanted.
template <class W, class F>
__device__ __forceinline__ void for_marked(const float* tile, W&& wanted, F&& f) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * (kTile / kPairsWarps);
#pragma unroll 1
  for (int k = 0; k < 2 * (kTile / kPairsWarps); ++k) {
    const int row = first + k / 2, column = k % 2 * 32;
    unsigned marked = __ballot_sync(0xffffffffu, wanted(tile[row * kTileStride + column + lane]));
    __syncwarp();  // f may write over what another lane has read
    for (; marked; marked &= marked - 1) f(row, column + __ffs(int(marked)) - 1);
  }
}

// The tile; all threads of the block, which may read it when it returns.
template <class S>
__device__ __forceinline__ void squared_distances(const PairsSide& side, PairsPlace place, char* stages, float* tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp / 4 * 32, column = warp % 4 * 16;
  const int64_t row_bytes = side.D_padded * int64_t(sizeof(S)), chunks = row_bytes / kChunkBytes;
  GramPart gram = {};
  __syncthreads();  // before the stages are written again
#pragma unroll
  for (int c = 0; c < kStages - 1; ++c) {
    if (c < chunks) copy_chunk(side, row_bytes, place, c, stages + c * kStageBytes);
    ptx::copy_async_commit();
  }
  int stage = 0, next = kStages - 1;
#pragma unroll 1
  for (int64_t c = 0; c < chunks; ++c) {
    ptx::copy_async_wait_group<kStages - 2>();
    __syncthreads();
    if (c + kStages - 1 < chunks) {
      copy_chunk(side, row_bytes, place, c + kStages - 1, stages + next * kStageBytes);
    }
    ptx::copy_async_commit();
    gram_chunk<S>(stages + stage * kStageBytes, row, column, gram);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  bool any_near = false;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int r = row + i / 8 * 16 + lane / 4 + i % 4 / 2 * 8, c = column + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
    const float norms = side.norms[place.i + r] + side.norms[place.j + c];
    const float squared = norms - 2 * gram[i / 8][i / 4 % 2][i % 4];
    // rows that are not there are 0, and near to none
    const bool self = place.i + r == place.j + c, near = !self && squared < norms * kNearTensorCores<S>;
    tile[r * kTileStride + c] = near ? -1.0f : self ? 0.0f : squared;
    any_near |= near;
  }
  if (!__syncthreads_or(any_near)) return;
  for_marked(
      tile, [](float value) { return value < 0; },
      [&](int r, int c) {
        const float squared = direct_squared<S>(side.source, place.i + r, place.j + c);
        if (lane == 0) tile[r * kTileStride + c] = -squared;
      });
  __syncthreads();
}

}  // namespace fastkd::cuda
