// A relational loss of pairs on the CPU, on one tile of inner products. Compiled once per
// instruction set.
//
//   d_ij = sqrt(max(|x_i|^2 + |x_j|^2 - 2 x_i.x_j, 1e-12)), d_ii = 0
//   u = d_student / mean, v = d_teacher / mean, r = clamp(u - v, -delta, delta)
//   loss = sum Huber(u - v) / N^2, C = sum r u / pairs, W_ij = (r - C) / d_ij
//   dL/dX = 2 / (N^2 mean) (diag(W 1) X - W X)
//
// The inner products come from the BLAS; everything else happens here while the tile is in L2, and
// the weights go back to the BLAS in its memory. Near pairs, whose differences would cancel in both
// products, are taken apart: the exact rows are subtracted for their distances, and once more
// for their part of the gradient.
#include "cpu/pairs_kernel.h"

#include <cmath>

#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Below this share of |x|^2 + |y|^2 a squared distance from the Gram has lost too many digits: a pair is near.
template <class T>
constexpr T kNear = T(1) / 256;

template <class T>
constexpr T kFloor = T(1e-12);  // of a squared distance, as published

template <class T>
T squared_distance(const T* x, const T* y, int64_t D) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < D; ++k) sum += (x[k] - y[k]) * (x[k] - y[k]);
  return sum;
}

template <class T>
void norms(const T* x, int64_t n, int64_t D, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const T* row = x + i * D;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < D; ++k) sum += row[k] * row[k];
    out[i] = sum;
  }
}

// Row i of a tile: inner products become distances. Returns how many others are near.
template <class T>
int distances_of_row(const PairsSide<T>& side, int64_t i, int64_t columns, int64_t stride, int64_t self) {
  T* d = side.tile + i * stride;
  const T norm = side.norms_i[i];
  const T* norms_j = side.norms_j;
  int near = 0;
#pragma omp simd reduction(+ : near)
  for (int64_t j = 0; j < columns; ++j) {
    const T both = norm + norms_j[j], squared = both - 2 * d[j];
    near += squared < kNear<T> * both;
    d[j] = squared;
  }
  const bool meets_itself = self >= 0 && self < columns;
  near -= meets_itself && d[self] < kNear<T> * 2 * norm;
  if (near) {
    for (int64_t j = 0; j < columns; ++j) {
      if (j != self && d[j] < kNear<T> * (norm + norms_j[j])) {
        d[j] = squared_distance(side.x_i + i * side.x_stride, side.x_j + j * side.x_stride, side.D);
      }
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) d[j] = std::sqrt(d[j] < kFloor<T> ? kFloor<T> : d[j]);
  if (meets_itself) d[self] = 0;
  return near;
}

template <class T>
bool distances(const PairsTile<T>& tile, int64_t begin, int64_t end, PairsSums& sums) {
  bool near = false;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t self = tile.diagonal < 0 ? -1 : tile.diagonal + i;
    near |= distances_of_row(tile.student, i, tile.columns, tile.stride, self) > 0;
    distances_of_row(tile.teacher, i, tile.columns, tile.stride, self);
    const T* s = tile.student.tile + i * tile.stride;
    const T* t = tile.teacher.tile + i * tile.stride;
    T student = 0, teacher = 0, squared = 0, product = 0;
#pragma omp simd reduction(+ : student, teacher, squared, product)
    for (int64_t j = 0; j < tile.columns; ++j) {
      student += s[j];
      teacher += t[j];
      squared += s[j] * s[j];
      product += s[j] * t[j];
    }
    sums.student += double(student);
    sums.teacher += double(teacher);
    sums.student_squared += double(squared);
    sums.product += double(product);
  }
  return near;
}

template <class T>
void loss(const PairsTile<T>& tile, const PairsStatistics<T>& all, int64_t begin, int64_t end, PairsSums& sums) {
  const T student_scale = all.student_scale, teacher_scale = all.teacher_scale, delta = all.delta;
  for (int64_t i = begin; i < end; ++i) {
    const T* s = tile.student.tile + i * tile.stride;
    const T* t = tile.teacher.tile + i * tile.stride;
    T huber = 0, shift = 0;
#pragma omp simd reduction(+ : huber, shift)
    for (int64_t j = 0; j < tile.columns; ++j) {
      const T u = s[j] * student_scale, e = u - t[j] * teacher_scale;
      const T upper = e > delta ? delta : e, r = upper < -delta ? -delta : upper;
      huber += r * (e - r / 2);
      shift += r * u;
    }
    sums.loss += double(huber);
    sums.shift += double(shift);
  }
}

template <bool kAnyNear, class T>
void weights_of(const PairsTile<T>& tile, const PairsStatistics<T>& all, int64_t begin, int64_t end, PairsSums& sums,
                T* row_sums, T* column_sums) {
  const T student_scale = all.student_scale, teacher_scale = all.teacher_scale, delta = all.delta, C = all.shift;
  const T least = std::sqrt(kFloor<T>);
  const T* norms_j = tile.student.norms_j;
  for (int64_t i = begin; i < end; ++i) {
    T* s = tile.student.tile + i * tile.stride;
    T* t = tile.teacher.tile + i * tile.stride;
    const T norm = tile.student.norms_i[i];
    T huber = 0, shift = 0, row = 0;
#pragma omp simd reduction(+ : huber, shift, row)
    for (int64_t j = 0; j < tile.columns; ++j) {
      const T d = s[j], u = d * student_scale, e = u - t[j] * teacher_scale;
      const T upper = e > delta ? delta : e, r = upper < -delta ? -delta : upper;
      huber += r * (e - r / 2);
      shift += r * u;
      const T quotient = (r - C) / d, w = d <= least ? T(0) : quotient;
      if constexpr (kAnyNear) {
        const bool near = d * d < kNear<T> * (norm + norms_j[j]);
        s[j] = near ? T(0) : w;
        t[j] = near ? w : T(0);
      } else {
        s[j] = w;
      }
      row += s[j];
    }
    if (column_sums) {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) column_sums[j] += s[j];
    }
    row_sums[i] += row;
    sums.loss += double(huber);
    sums.shift += double(shift);
  }
}

template <class T>
void weights(const PairsTile<T>& tile, const PairsStatistics<T>& all, int64_t begin, int64_t end, bool any_near,
             PairsSums& sums, T* row_sums, T* column_sums) {
  any_near ? weights_of<true>(tile, all, begin, end, sums, row_sums, column_sums)
           : weights_of<false>(tile, all, begin, end, sums, row_sums, column_sums);
}

// Seldom needed: one loop for near pairs and none.
template <class T>
void inverses(const PairsTile<T>& tile, int64_t begin, int64_t end, bool any_near, T* row_sums, T* column_sums) {
  const T least = std::sqrt(kFloor<T>), below = any_near ? kNear<T> : T(0);
  const T* norms_j = tile.student.norms_j;
  for (int64_t i = begin; i < end; ++i) {
    T* s = tile.student.tile + i * tile.stride;
    T* t = tile.teacher.tile + i * tile.stride;
    const T norm = tile.student.norms_i[i];
    T row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < tile.columns; ++j) {
      const T d = s[j], quotient = 1 / d, w = d <= least ? T(0) : quotient;
      const bool near = d * d < below * (norm + norms_j[j]);
      s[j] = near ? T(0) : w;
      t[j] = near ? w : T(0);
      row += s[j];
    }
    if (column_sums) {
#pragma omp simd
      for (int64_t j = 0; j < tile.columns; ++j) column_sums[j] += s[j];
    }
    row_sums[i] += row;
  }
}

template <class T>
void near(const PairsTile<T>& tile, int64_t begin, int64_t end, T* out_i, T* out_j) {
  const PairsSide<T>& side = tile.student;
  for (int64_t i = begin; i < end; ++i) {
    const T *w = tile.teacher.tile + i * tile.stride, *x = side.x_i + i * side.x_stride;
    T* to_i = out_i + i * side.D;
    for (int64_t j = 0; j < tile.columns; ++j) {
      if (w[j] == 0) continue;
      const T* y = side.x_j + j * side.x_stride;
      T* to_j = out_j ? out_j + j * side.D : nullptr;
      for (int64_t k = 0; k < side.D; ++k) to_i[k] -= w[j] * (x[k] - y[k]);
      for (int64_t k = 0; k < side.D && to_j; ++k) to_j[k] += w[j] * (x[k] - y[k]);
    }
  }
}

template <class T>
const PairsKernel<T> kernel = {norms<T>, distances<T>, loss<T>, weights<T>, inverses<T>, near<T>};

}  // namespace

template <class T>
const PairsKernel<T>& pairs_kernel() {
  return kernel<T>;
}
template const PairsKernel<float>& pairs_kernel<float>();
template const PairsKernel<double>& pairs_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
