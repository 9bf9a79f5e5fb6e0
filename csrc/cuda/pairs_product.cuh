// sum_j w_ij (x_i - x_j) of 64 rows i and up to 512 columns, on the tensor cores: (W 1) x_i - W X,
// W in shared memory, X through it in chunks. W 1 is summed from the same rounded W that is
// multiplied. The weights are rounded to bfloat16 where the embeddings are; to tf32 where they are
// float16, whose range they would leave, and float16 is exact in tf32; in float they are split, as
// the embeddings are. Near pairs are left out here: their x_i - x_j is taken as it is, and added to
// memory before.
#pragma once
#include "cuda/pairs_tile.cuh"

namespace fastkd::cuda {

template <class S>
class WeightedProduct {
 public:
  static constexpr int kSlice = pairs_layout(kStorageOf<S>).slice;

  __device__ __forceinline__ WeightedProduct(const PairsParams& P, int row_tile, int slice)
      : P_(P), row_tile_(row_tile), slice_(slice) {}

  __device__ __forceinline__ static float rounded(float w) {
    if constexpr (std::is_same_v<S, __nv_bfloat16>) return __bfloat162float(__float2bfloat16_rn(w));
    if constexpr (std::is_same_v<S, __half>) return __uint_as_float(ptx::to_tf32(w));
    return w;
  }

  // tile: w_ij of the near pairs, else 0. A warp its 8 rows, a lane every 32nd column: one order.
  __device__ __forceinline__ void near(const float* tile, int64_t j, float* partial, int* touched) const {
    using Source = std::conditional_t<sizeof(S) == 4, AnyType, S>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Embeddings& x = P_.student.source;
    const int64_t D_padded = P_.student.D_padded, end = x.D < first_column() + kSlice ? x.D : first_column() + kSlice;
    const bool first = !touched[warp];
    __syncwarp();
#pragma unroll 1
    for (int r = 0; first && r < kTile / kPairsWarps; ++r) {
      float* row = partial + (i() + warp * (kTile / kPairsWarps) + r) * D_padded;
      for (int64_t d = first_column() + lane; d < end; d += 32) row[d] = 0;
    }
    if (lane == 0) touched[warp] = 1;
    for_marked(
        tile, [](float w) { return w != 0; },
        [&](int r, int c) {
          const float w = tile[r * kTileStride + c];
          float* row = partial + (i() + r) * D_padded;
#pragma unroll 1
          for (int64_t d = first_column() + lane; d < end; d += 32) {
            row[d] += w * (load_one<Source, float>(x.at(i() + r, d), x.dtype) -
                           load_one<Source, float>(x.at(j + c, d), x.dtype));
          }
        });
  }

  // tile: w_ij, j from `j`.
  __device__ __forceinline__ void add(const float* tile, int64_t j, char* stages) {
    constexpr int kChunks = kTile / kRows;
#pragma unroll
    for (int c = 0; c < kStages - 1; ++c) {
      copy(j + c * kRows, stages + c * kStageBytes);
      ptx::copy_async_commit();
    }
#pragma unroll 1
    for (int c = 0; c < kChunks; ++c) {
      ptx::copy_async_wait_group<kStages - 2>();
      __syncthreads();
      if (c + kStages - 1 < kChunks)
        copy(j + (c + kStages - 1) * kRows, stages + (c + kStages - 1) % kStages * kStageBytes);
      ptx::copy_async_commit();
      chunk(tile + c * kRows, stages + c % kStages * kStageBytes);
    }
  }

  // row_sums: W 1, of this block's rows; touched: whose rows have something in memory.
  __device__ __forceinline__ void store(const double* row_sums, const int* touched, float* partial) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kColumnTiles; ++t) {
      const int64_t d = first_column() + tile_column(t) + lane % 4 * 2;
      if (d >= P_.student.D_padded) break;
#pragma unroll
      for (int k = 0; k < 2 * kRowTiles; ++k) {
        const int r = k * 8 + lane / 4;
        const int64_t at = (i() + r) * P_.student.D_padded + d;
        const S* x = reinterpret_cast<const S*>(P_.student.rows) + at;
        const float row_sum = float(row_sums[r]);
        float2 out = {row_sum * widen<float>(x[0]) - sum_[k / 2][t][k % 2 * 2],
                      row_sum * widen<float>(x[1]) - sum_[k / 2][t][k % 2 * 2 + 1]};
        float2* to = reinterpret_cast<float2*>(partial + at);
        if (touched[k]) {  // the 8 rows of warp k
          out.x += to->x;
          out.y += to->y;
        }
        *to = out;
      }
    }
  }

 private:
  static constexpr int kRows = sizeof(S) == 4 ? 8 : 16;  // of X in a chunk
  static constexpr int kRowBytes = kSlice * sizeof(S);
  static constexpr int kRowStride = kRowBytes + (sizeof(S) == 4 ? 32 : 16);
  static constexpr int kRowTiles = kTile / 16, kColumnTiles = kSlice / 8 / kPairsWarps;
  static_assert(kRows * kRowStride <= kStageBytes && kTile / kPairsWarps == 8);

  // Tiles of 8 columns are dealt to the warps in turn: few columns are everyone's work.
  __device__ __forceinline__ static int tile_column(int t) { return (t * kPairsWarps + threadIdx.x / 32) * 8; }
  __device__ __forceinline__ bool used(int t) const { return first_column() + tile_column(t) < P_.student.D_padded; }

  __device__ __forceinline__ void copy(int64_t j, char* stage) const {
    constexpr int kWords = kRowBytes / 16;
    const int64_t row_bytes = P_.student.D_padded * int64_t(sizeof(S)), at = first_column() * int64_t(sizeof(S));
#pragma unroll
    for (int k = 0; k < kRows * kWords / kPairsThreads; ++k) {
      const int word = threadIdx.x + k * kPairsThreads, row = word / kWords, byte = word % kWords * 16;
      if (at + byte < row_bytes) {
        ptx::copy_async_16(stage + row * kRowStride + byte, P_.student.rows + (j + row) * row_bytes + at + byte);
      }
    }
  }

  // W's rows 16 m + g (+ 8) and X's first rows of the chunk: the warp's column tiles.
  __device__ __forceinline__ void chunk(const float* tile, const char* stage) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (std::is_same_v<S, __nv_bfloat16>) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int k = 0; k < kRowTiles * 4; ++k) {
        const float* w = tile + (k / 4 * 16 + g + k % 2 * 8) * kTileStride + k % 4 / 2 * 8 + 2 * t;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(w[0], w[1]);
        a[k / 4][k % 4] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      const char* at = stage + lane % 16 * kRowStride;
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        if (!used(n)) break;
        uint32_t b[4];  // two column tiles
        ptx::ldmatrix_x4_trans(b, at + tile_column(n + lane / 16) * int(sizeof(S)));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          ptx::mma_bf16(sum_[m][n], a[m], b[0], b[1]);
          ptx::mma_bf16(sum_[m][n + 1], a[m], b[2], b[3]);
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < kRows; k += 8) tf32_step(tile + k + g * kTileStride + t, stage, k + t, g);
    }
  }

  __device__ __forceinline__ void tf32_step(const float* w, const char* stage, int row, int g) {
    using A = std::conditional_t<sizeof(S) == 4, SplitA, uint32_t[4]>;
    A a[kRowTiles];
#pragma unroll
    for (int k = 0; k < kRowTiles * 4; ++k) {
      const float x = w[(k / 4 * 16 + k % 2 * 8) * kTileStride + k % 4 / 2 * 4];
      if constexpr (sizeof(S) == 4) {
        a[k / 4].set(k % 4, x);
      } else {
        a[k / 4][k % 4] = __float_as_uint(x);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (!used(n)) break;
      const S* x = reinterpret_cast<const S*>(stage + row * kRowStride) + tile_column(n) + g;
      const float x0 = widen<float>(x[0]), x1 = widen<float>(x[4 * kRowStride / int(sizeof(S))]);
      if constexpr (sizeof(S) == 4) {
        const Split b0(x0), b1(x1);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          float part[4] = {};
          mma_split(part, a[m], b0, b1);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum_[m][n][i] += part[i];
        }
      } else {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) ptx::mma_tf32(sum_[m][n], a[m], __float_as_uint(x0), __float_as_uint(x1));
      }
    }
  }

  __device__ __forceinline__ int64_t i() const { return int64_t(row_tile_) * kTile; }
  __device__ __forceinline__ int64_t first_column() const { return int64_t(slice_) * kSlice; }

  const PairsParams& P_;
  int row_tile_, slice_;
  float sum_[kRowTiles][kColumnTiles][4] = {};
};

}  // namespace fastkd::cuda
