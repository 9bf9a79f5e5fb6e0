// The pairs schedule on the GPU: a relation between all pairs of N samples, of student [N, D_s] and
// teacher [N, D_t], and its gradient; the formulas are those of math/relation.h.
//
// 1. embeddings_*: both sides as tiles want them.
// 2. pairs_sweep_kernel, over the upper triangle of 64 x 64 tiles: the sums that scale the relation.
// 3. the same: the loss.
// 4. pairs_gradient_kernel: a block has 64 rows and up to 512 columns of the gradient, forms tiles
//    of W from distances that are computed once more, and multiplies them with X at once. Where
//    there are few such blocks the sum over j is split among several.
// 5. pairs_finish_kernel: sums the parts, in the gradient's own type.
// The grids are those of all rows; where the device knows of fewer, their tiles are what is walked.
// No N x N matrix exists: extra memory is two copies of the embeddings, the parts of the gradient, and
// two numbers a block. Traffic: (D_s + D_t) N^2 / 64 values from the L2 for 2 and 3 together, as
// much and N^2 D_s / 64 for each 512 columns in 4. Saved for backward: the gradient.
#pragma once
#include "cuda/pairs_double.cuh"
#include "cuda/pairs_product.cuh"

namespace fastkd::cuda {

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
__device__ __forceinline__ void both_distances(const PairsParams& P, PairsPlace place, PairsRoom<Compute<S>>& room) {
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {  // in a loop: the code is there once
    Compute<S>* tile = side ? room.teacher : room.student;
    if constexpr (std::is_same_v<S, double>) {
      squared_distances(side ? P.teacher : P.student, place, room.stages, tile);
    } else {
      squared_distances<S>(side ? P.teacher : P.student, place, room.stages, tile);
    }
  }
}

// Of all threads of a block: every thread gets both.
__device__ __forceinline__ void block_sums(double& a, double& b, double (*room)[kPairsWarps]) {
  a = block_sum<kPairsWarps>(a, room[0]);
  b = block_sum<kPairsWarps>(b, room[1]);
}
__device__ __forceinline__ void sum_blocks(const double* sums, int blocks, double (*room)[kPairsWarps], double& a,
                                           double& b) {
  a = b = 0;
  for (int i = threadIdx.x; i < blocks; i += kPairsThreads) {
    a += sums[2 * i];
    b += sums[2 * i + 1];
  }
  block_sums(a, b, room);
}

// A walk over the tiles of the upper triangle, row by row, in strides.
class UpperTiles {
 public:
  explicit __device__ __forceinline__ UpperTiles(int first) : row_(0), column_(first) {}
  // Whether the walk is at a tile, of `tiles` in each direction.
  __device__ __forceinline__ bool at_tile(int tiles) {
    for (; row_ < tiles && column_ >= tiles; ++row_) column_ += row_ + 1 - tiles;
    return row_ < tiles;
  }
  __device__ __forceinline__ void advance(int stride) { column_ += stride; }
  __device__ __forceinline__ PairsPlace place() const { return {int64_t(row_) * kTile, int64_t(column_) * kTile}; }

 private:
  int row_, column_;
};

// f(weight), where weight(i, j) is a pair's.
template <class T, class F>
__device__ __forceinline__ void with_weights(const PairsParams& P, F&& f) {
  if (const T* rows = static_cast<const T*>(P.row_weights)) {
    f([rows](int64_t i, int64_t j) { return (__ldg(rows + i) + __ldg(rows + j)) / 2; });
  } else {
    f([](int64_t, int64_t) { return T(1); });
  }
}

enum class Sweep { kMeasure, kLoss };

// grid: sweep_blocks.
template <class S, class R, Sweep kSweep>
__global__ void __launch_bounds__(kPairsThreads, 2) pairs_sweep_kernel(const __grid_constant__ PairsParams P) {
  using T = Compute<S>;
  PairsRoom<T>& room = *reinterpret_cast<PairsRoom<T>*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) room.rows = PairsRows(P);
  __syncthreads();
  RelationSums sums{};
  if (kSweep == Sweep::kLoss && R::measures(P.options)) {
    sum_blocks(P.measure_sums, P.sweep_blocks, room.sums, sums.student, sums.teacher);
  }
  const R relation(room.rows.options(P), sums);
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  double first = 0, second = 0;
  for (UpperTiles walk(blockIdx.x); walk.at_tile(room.rows.tiles); walk.advance(gridDim.x)) {
    const PairsPlace place = walk.place();
    both_distances<S>(P, place, room);
    T a = 0, b = 0;
    const auto add_pairs = [&](auto&& add) {
#pragma unroll 4
      for (int k = 0; k < kTile / 4; ++k) {
        const int c = column + 4 * k, at = row * kTileStride + c;
        if (!is_pair(room.rows, place.i + row, place.j + c)) continue;
        T x = 0, y = 0;
        add(c, R::measure(std::fabs(room.student[at])), R::measure(std::fabs(room.teacher[at])), x, y);
        a += x;
        b += y;
      }
    };
    if constexpr (kSweep == Sweep::kMeasure) {
      add_pairs([](int, T student, T teacher, T& x, T& y) {
        x = student;
        y = teacher;
      });
    } else {
      with_weights<T>(P, [&](auto&& weight) {
        add_pairs([&](int c, T student, T teacher, T& x, T& y) {
          relation.pair(student, teacher, weight(place.i + row, place.j + c), x, y);
        });
      });
    }
    const double times = place.i == place.j ? 1 : 2;  // both orders of a pair
    first += times * double(a);
    second += times * double(b);
  }
  block_sums(first, second, room.sums + 2);
  if (threadIdx.x) return;
  double* out = (kSweep == Sweep::kMeasure ? P.measure_sums : P.loss_sums) + 2 * int64_t(blockIdx.x);
  out[0] = first;
  out[1] = second;
}

// grid: tiles * slices * splits, the splits of one part of the gradient side by side.
template <class S, class R>
__global__ void __launch_bounds__(kPairsThreads, 1) pairs_gradient_kernel(const __grid_constant__ PairsParams P) {
  using T = Compute<S>;
  using Product = std::conditional_t<std::is_same_v<S, double>, DifferencesProduct, WeightedProduct<S>>;
  PairsRoom<T>& room = *reinterpret_cast<PairsRoom<T>*>(ptx::dynamic_shared());
  if (threadIdx.x == 0) room.rows = PairsRows(P);
  __syncthreads();
  if (int(blockIdx.x / unsigned(P.splits)) / P.slices >= room.rows.tiles) return;
  RelationSums sums{};
  if (R::measures(P.options)) {
    sum_blocks(P.measure_sums, P.sweep_blocks, room.sums, sums.student, sums.teacher);
  }
  sum_blocks(P.loss_sums, P.sweep_blocks, room.sums + 2, sums.loss, sums.slope);
  R* const shared_relation = reinterpret_cast<R*>(room.relation);
  static_assert(sizeof(R) <= sizeof(room.relation));
  if (threadIdx.x == 0) *shared_relation = R(room.rows.options(P), sums);
  if (threadIdx.x < kPairsWarps) room.touched[threadIdx.x] = 0;
  if (threadIdx.x < kTile) room.row_sums[threadIdx.x] = 0;

  const int split = int(blockIdx.x % unsigned(P.splits)), part = int(blockIdx.x / unsigned(P.splits));
  const int row_tile = part / P.slices;
  T* partial = reinterpret_cast<T*>(P.partial) + split * P.tiles * kTile * P.student.D_padded;
  Product product(P, row_tile, part % P.slices);
  const int row = threadIdx.x / 4, column = threadIdx.x % 4;
  for (int block = split; block < room.rows.tiles; block += P.splits) {
    const PairsPlace place{int64_t(row_tile) * kTile, int64_t(block) * kTile};
    both_distances<S>(P, place, room);
    const R relation = *shared_relation;
    bool any_near = false;
    T of_tile = 0;
    with_weights<T>(P, [&](auto&& weight) {
#pragma unroll 4
      for (int k = 0; k < kTile / 4; ++k) {
        const int c = column + 4 * k, at = row * kTileStride + c;
        const T student = room.student[at];
        const bool pair = is_pair(room.rows, place.i + row, place.j + c), near = pair && std::signbit(student);
        const T w = pair ? relation.weight(R::measure(std::fabs(student)), R::measure(std::fabs(room.teacher[at])),
                                           weight(place.i + row, place.j + c))
                         : T(0);
        const T far = near ? T(0) : Product::rounded(w);
        room.student[at] = far;
        room.teacher[at] = near ? w : T(0);
        of_tile += far;
        any_near |= near;
      }
    });
    of_tile += __shfl_xor_sync(0xffffffffu, of_tile, 1);
    of_tile += __shfl_xor_sync(0xffffffffu, of_tile, 2);
    if (column == 0) room.row_sums[row] += double(of_tile);
    if (__syncthreads_or(any_near)) product.near(room.teacher, place.j, partial, room.touched);
    product.add(room.student, place.j, room.stages);
  }
  __syncthreads();
  product.store(room.row_sums, room.touched, partial);
}

// Loss, and where it is wanted the gradient in its own type: of the first block, and of all.
template <class T, class R>
__global__ void __launch_bounds__(kPairsThreads) pairs_finish_kernel(const __grid_constant__ PairsParams P) {
  const PairsRows rows(P);
  if (blockIdx.x == 0) {
    double loss, slope;
    sum_blocks(P.loss_sums, P.sweep_blocks, reinterpret_cast<double (*)[kPairsWarps]>(ptx::dynamic_shared()), loss,
               slope);
    T* out = static_cast<T*>(P.loss);
    const T value = rows.N ? T(P.weight * R::loss_scale(rows.options(P)) * loss) : T(0);
    if (threadIdx.x == 0) *out = P.accumulate ? *out + value : value;
  }
  if (!P.grad) return;
  const T* partial = reinterpret_cast<const T*>(P.partial);
  const T weight = T(P.weight);
  const int64_t D = P.student.source.D, D_padded = P.student.D_padded, step = P.tiles * kTile * D_padded;
  for (int64_t at = blockIdx.x * int64_t(kPairsThreads) + threadIdx.x; at < P.options.N * D;
       at += int64_t(gridDim.x) * kPairsThreads) {
    const T* p = partial + at / D * D_padded + at % D;
    T sum = 0;
    for (int s = 0; s < P.splits && at < rows.N * D; ++s) sum += p[s * step];
    sum *= weight;
    char* out = static_cast<char*>(P.grad) + at * P.grad_element_size;
    if (P.accumulate) sum += load_one<AnyType, T>(out, P.grad_dtype);
    store_one<AnyType>(out, P.grad_dtype, sum);
  }
}

}  // namespace fastkd::cuda
