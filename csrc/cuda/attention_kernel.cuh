// Attention transfer on the GPU, of maps [B, C, H, W] of student and teacher:
//
//   A = 1/C sum_c |x_c|^p, f = A / max(|A|, 1e-12) over H W; loss = 1/(B H W) sum (f_s - f_t)^2
//   grad = 2 / (B H W) a_s (e - f_s sum f_s e) p / C |x|^(p - 1) sign x,  e = f_s - f_t
//
// Three launches: positions are rows of channels, whose powers are added up; a block a sample compares
// both maps; the student is read once more and its gradient written. Blocks walk over rows as those of
// the features schedule do.
// Traffic: student twice, teacher and gradient once; 16 bytes a position between the launches.
// Powers that leave the range of T are computed in double.
#pragma once
#include "cuda/attention_launch.h"
#include "cuda/features_rows.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace fastkd::cuda {

template <bool kSquares, class T>
__device__ __forceinline__ T power_of(T x, T p) {
  if constexpr (kSquares) return x * x;
  return pow(x < 0 ? -x : x, p);
}
// |x|^(p - 1) sign x
template <bool kSquares, class T>
__device__ __forceinline__ T slope_of(T x, T p) {
  if constexpr (kSquares) return x;
  const T y = pow(x < 0 ? -x : x, p - 1);
  return x > 0 ? y : x < 0 ? -y : x;  // of NaN itself
}

template <class T, class K, bool kSquares>
struct AttentionWalk : BlockRows<T, K> {
  using Rows = BlockRows<T, K>;
  using Rows::by, Rows::counts, Rows::give, Rows::layer, Rows::part, Rows::take;
  using typename Rows::Place;
  static constexpr int kRows = K::kRows, kPacks = K::template kKept<T>, kKept = kFeaturesKept<T>;

  const double p;

  __device__ __forceinline__ AttentionWalk(const FeaturesPart<T>& layer, double p)
      : Rows(layer, reinterpret_cast<double*>(ptx::dynamic_shared())), p(p) {}

  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int64_t first = (blockIdx.x - layer.first_block) * int64_t(layer.rows); first < layer.N;
         first += int64_t(layer.blocks) * layer.rows) {
      f(first);
    }
  }

  __device__ __forceinline__ void load(const Place& place, int begin, T* values) const {
    RawPacks<T, K> raw;
    raw.load(layer.student, place.at.student, begin, place.exists ? place.end(begin, part()) : 0, by);
    raw.unpack(layer.student.dtype, values);
  }

  // In S: T, or double where its range is too small.
  template <class S>
  __device__ __forceinline__ void give_powers(const Place& place) const {
#pragma unroll 1
    for (int begin = 0; begin < layer.packs; begin += part()) {
      T values[kKept];
      load(place, begin, values);
      S sum[kRows] = {};
#pragma unroll
      for (int i = 0; i < kKept; ++i) sum[i % kRows] += power_of<kSquares>(S(values[i]), S(p));
      give(0, sum, begin == 0);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void powers(double* map) const {
    each([&](int64_t first) {
      const Place place(*this, first);
      give_powers<T>(place);
      bool again = false;
      for (int r = threadIdx.x; r < by.rows && first + r < layer.N; r += kFeaturesThreads) {
        const double sum = take(0, r);
        map[first + r] = sum / double(layer.D);
        again |= sizeof(T) == 4 && !in_float_range(sum);
      }
      if (!__syncthreads_or(again)) return;
      give_powers<double>(place);
      for (int r = threadIdx.x; r < by.rows && first + r < layer.N; r += kFeaturesThreads) {
        if (!in_float_range(map[first + r] * double(layer.D))) map[first + r] = take(0, r) / double(layer.D);
      }
      __syncthreads();
    });
  }

  __device__ __forceinline__ void slopes(const double* map, const double* factors) const {
    each([&](int64_t first) {
      const Place place(*this, first);
      double factor[kRows];
      bool wide = false;
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        factor[q] = place.here[q] ? factors[place.row + q] : 0;
        const double size = factor[q] < 0 ? -factor[q] : factor[q];
        wide |= sizeof(T) == 4 && place.here[q] &&
                (!in_float_range(map[place.row + q] * double(layer.D)) || !in_float_range(size));
      }
#pragma unroll 1
      for (int begin = 0; begin < layer.packs; begin += part()) {
        T values[kKept];
        load(place, begin, values);
        if (wide) {
#pragma unroll
          for (int i = 0; i < kKept; ++i) {
            values[i] = T(factor[i % kRows] * slope_of<kSquares>(double(values[i]), p));
          }
        } else {
#pragma unroll
          for (int i = 0; i < kKept; ++i) values[i] = T(factor[i % kRows]) * slope_of<kSquares>(values[i], T(p));
        }
        store_packs<K::kElements, kPacks>(layer.grad.dtype, place.at.grad + int64_t(begin + by.rank) * layer.grad.step,
                                          by.threads * layer.grad.step,
                                          (place.exists ? place.end(begin, part()) : 0) - by.rank, by.threads, values);
      }
    });
  }
};

// grid: the blocks of the student, then those of the teacher.
template <class T, bool kSquares>
__global__ void __launch_bounds__(kFeaturesThreads, 2)
    attention_powers_kernel(const __grid_constant__ AttentionPowers<T> A) {
  const int side = int(blockIdx.x) >= A.sides[1].first_block;
  with_pack(A.sides[side],
            [&](auto pack) { AttentionWalk<T, decltype(pack), kSquares>(A.sides[side], A.p).powers(A.maps[side]); });
}

template <class T, bool kSquares>
__global__ void __launch_bounds__(kFeaturesThreads, 2)
    attention_slopes_kernel(const __grid_constant__ AttentionSlopes<T> A) {
  with_pack(A.layer,
            [&](auto pack) { AttentionWalk<T, decltype(pack), kSquares>(A.layer, A.p).slopes(A.map, A.factors); });
}

inline constexpr int kMapThreads = 1024;

// grid: samples.
template <class T>
__global__ void __launch_bounds__(kMapThreads) attention_maps_kernel(const __grid_constant__ AttentionMaps<T> M) {
  double* room = reinterpret_cast<double*>(ptx::dynamic_shared());
  const double* student = M.student + blockIdx.x * M.positions;
  double* teacher = M.teacher + blockIdx.x * M.positions;
  const auto sum = [&](auto of) {
    double found = 0;
    for (int64_t i = threadIdx.x; i < M.positions; i += kMapThreads) found += of(i);
    found = block_sum<kMapThreads / 32>(found, room);
    room += kMapThreads / 32;
    return found;
  };
  const auto scale_of = [&](const double* map) {
    return feature_scale(Feature::kL2, 0, sum([&](int64_t i) { return map[i] * map[i]; }), M.positions);
  };
  const FeatureScale of_student = scale_of(student);
  const double a = of_student.factor, b = scale_of(teacher).factor;
  const auto difference = [&](int64_t i) { return product(student[i], a) - product(teacher[i], b); };
  const double loss = sum([&](int64_t i) { return difference(i) * difference(i); });
  const double along = sum([&](int64_t i) { return student[i] * a * difference(i); });
  if (threadIdx.x == 0) M.losses[blockIdx.x] = loss;
  if (!M.factors) return;
  const double scale = M.scale * (M.upstream ? double(*M.upstream) : 1.0);
  const FeatureSlope slope = feature_slope(Feature::kL2, of_student, 0, along, M.positions, scale);
  for (int64_t i = threadIdx.x; i < M.positions; i += kMapThreads) {
    teacher[i] = slope.k * (difference(i) - student[i] * a * slope.p);
  }
}

}  // namespace fastkd::cuda
