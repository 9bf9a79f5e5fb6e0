// A relational loss of pairs on the CPU, on one tile of inner products. Compiled once per
// instruction set.
//
//   d_ij = sqrt(max(|x_i|^2 + |x_j|^2 - 2 x_i.x_j, 1e-12)), d_ii = 0
//   u = d_student / mean, v = d_teacher / mean, r = clamp(u - v, -delta, delta)
//   loss = sum Huber(u - v) / N^2, C = sum r u / pairs, W_ij = (r - C) / d_ij
//   dL/dX = 2 / (N^2 mean) (diag(W 1) X - W X)
//
// The inner products come from the BLAS; everything else happens here while the tile is in L2, and
// the weights go back to the BLAS in its memory.
#include "cpu/pairs_kernel.h"

#include <cmath>

#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Below this share of |x|^2 + |y|^2 a squared distance from the Gram has lost too many digits.
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

// Row i of a tile: inner products become distances.
template <class T>
void distances_of_row(const PairsSide<T>& side, int64_t i, int64_t columns, int64_t stride, int64_t self) {
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
  if (near > (self >= 0 && self < columns)) {
    for (int64_t j = 0; j < columns; ++j) {
      if (j != self && d[j] < kNear<T> * (norm + norms_j[j])) {
        d[j] = squared_distance(side.x_i + i * side.D, side.x_j + j * side.D, side.D);
      }
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) d[j] = std::sqrt(d[j] < kFloor<T> ? kFloor<T> : d[j]);
  if (self >= 0 && self < columns) d[self] = 0;
}

template <class T>
void distances(const PairsTile<T>& tile, int64_t begin, int64_t end, PairsSums& sums) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t self = tile.diagonal < 0 ? -1 : tile.diagonal + i;
    distances_of_row(tile.student, i, tile.columns, tile.stride, self);
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

template <class T>
void weights(const PairsTile<T>& tile, const PairsStatistics<T>& all, int64_t begin, int64_t end, PairsSums& sums,
             T* row_sums, T* column_sums) {
  const T student_scale = all.student_scale, teacher_scale = all.teacher_scale, delta = all.delta, C = all.shift;
  const T least = std::sqrt(kFloor<T>);
  for (int64_t i = begin; i < end; ++i) {
    T* s = tile.student.tile + i * tile.stride;
    const T* t = tile.teacher.tile + i * tile.stride;
    T huber = 0, shift = 0, row = 0;
#pragma omp simd reduction(+ : huber, shift, row)
    for (int64_t j = 0; j < tile.columns; ++j) {
      const T d = s[j], u = d * student_scale, e = u - t[j] * teacher_scale;
      const T upper = e > delta ? delta : e, r = upper < -delta ? -delta : upper;
      huber += r * (e - r / 2);
      shift += r * u;
      const T w = (r - C) / d;
      s[j] = d <= least ? T(0) : w;
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
void inverses(const PairsTile<T>& tile, int64_t begin, int64_t end, T* row_sums, T* column_sums) {
  const T least = std::sqrt(kFloor<T>);
  for (int64_t i = begin; i < end; ++i) {
    T* s = tile.student.tile + i * tile.stride;
    T row = 0;
#pragma omp simd reduction(+ : row)
    for (int64_t j = 0; j < tile.columns; ++j) {
      const T w = 1 / s[j];
      s[j] = s[j] <= least ? T(0) : w;
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
const PairsKernel<T> kernel = {norms<T>, distances<T>, loss<T>, weights<T>, inverses<T>};

}  // namespace

template <class T>
const PairsKernel<T>& pairs_kernel() {
  return kernel<T>;
}
template const PairsKernel<float>& pairs_kernel<float>();
template const PairsKernel<double>& pairs_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
