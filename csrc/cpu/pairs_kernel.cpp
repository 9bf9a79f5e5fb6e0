// A relation of pairs on the CPU, on one tile of inner products: the functors of math/relation.h.
// Compiled once per instruction set.
//
//   |x_i - x_j|^2 = |x_i|^2 + |x_j|^2 - 2 x_i.x_j, dL/dX = diag(W 1) X - W X
//
// The inner products come from the BLAS; everything else happens here while the tile is in L2, and
// the weights go back to the BLAS in its memory. Near pairs, whose differences would cancel in both
// products, are taken apart: the exact rows are subtracted for their distances, and once more
// for their part of the gradient.
#include "cpu/pairs_kernel.h"

#include <cmath>

#include "cpu/distances.h"
#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Row i of a tile: inner products become measures. Returns whether any others are near.
template <class R, class T>
bool measures_of_row(const PairsSide<T>& side, int64_t i, int64_t columns, int64_t stride, int64_t self) {
  T* m = side.tile + i * stride;
  const bool near = squared_distances(m, side.norms_i[i], side.norms_j, columns, self, side.x_i + i * side.x_stride,
                                      side.x_j, side.D, side.x_stride);
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) m[j] = R::measure(m[j]);
  if (self >= 0 && self < columns) m[self] = 0;
  return near;
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

// Of row i's pairs: weight(j).
template <bool kWeighted, class T>
struct WeightsOfRow {
  WeightsOfRow(const PairsTile<T>& tile, int64_t i)
      : own(kWeighted ? tile.half_weights_i[i] : T(0)), others(tile.half_weights_j) {}
  T operator()(int64_t j) const {
    if constexpr (kWeighted) return own + others[j];
    return T(1);
  }
  T own;
  const T* others;
};

template <class R, bool kWeighted, class T>
bool measures(const PairsTile<T>& tile, int64_t begin, int64_t end, RelationSums& sums) {
  bool near = false;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t self = tile.diagonal < 0 ? -1 : tile.diagonal + i;
    near |= measures_of_row<R>(tile.student, i, tile.columns, tile.stride, self);
    measures_of_row<R>(tile.teacher, i, tile.columns, tile.stride, self);
    const T* s = tile.student.tile + i * tile.stride;
    const T* t = tile.teacher.tile + i * tile.stride;
    const WeightsOfRow<kWeighted, T> weight(tile, i);
    T student = 0, teacher = 0, squared = 0, product = 0;
#pragma omp simd reduction(+ : student, teacher, squared, product)
    for (int64_t j = 0; j < tile.columns; ++j) {
      student += s[j];
      teacher += t[j];
      squared += weight(j) * (s[j] * s[j]);
      product += weight(j) * (s[j] * t[j]);
    }
    sums.student += double(student);
    sums.teacher += double(teacher);
    sums.student_squared += double(squared);
    sums.product += double(product);
  }
  return near;
}

template <class R, bool kWeighted, class T>
void loss(const PairsTile<T>& tile, const RelationOptions& options, const RelationSums& known, int64_t begin,
          int64_t end, RelationSums& sums) {
  const R relation(options, known);
  for (int64_t i = begin; i < end; ++i) {
    const T* s = tile.student.tile + i * tile.stride;
    const T* t = tile.teacher.tile + i * tile.stride;
    const WeightsOfRow<kWeighted, T> weight(tile, i);
    T loss = 0, slope = 0;
#pragma omp simd reduction(+ : loss, slope)
    for (int64_t j = 0; j < tile.columns; ++j) relation.pair(s[j], t[j], weight(j), loss, slope);
    sums.loss += double(loss);
    sums.slope += double(slope);
  }
}

// The student's tile becomes weights, f(s, t, w, loss, slope) of each pair's measures and weight; near pairs' go
// into the teacher's.
template <bool kAnyNear, bool kWeighted, class T, class F>
void replace(const PairsTile<T>& tile, int64_t begin, int64_t end, RelationSums& sums, T* row_sums, T* column_sums,
             F&& f) {
  const T* norms_j = tile.student.norms_j;
  for (int64_t i = begin; i < end; ++i) {
    T* s = tile.student.tile + i * tile.stride;
    T* t = tile.teacher.tile + i * tile.stride;
    const T norm = tile.student.norms_i[i];
    const WeightsOfRow<kWeighted, T> weight(tile, i);
    T loss = 0, slope = 0, row = 0;
#pragma omp simd reduction(+ : loss, slope, row)
    for (int64_t j = 0; j < tile.columns; ++j) {
      const T w = f(s[j], t[j], weight(j), loss, slope);
      if constexpr (kAnyNear) {
        const bool near = s[j] * s[j] < kNear<T> * (norm + norms_j[j]);
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
    sums.loss += double(loss);
    sums.slope += double(slope);
  }
}

template <class R, bool kWeighted, class T>
void weights(const PairsTile<T>& tile, const RelationOptions& options, const RelationSums& known, int64_t begin,
             int64_t end, bool any_near, RelationSums& sums, T* row_sums, T* column_sums) {
  const R relation(options, known);
  const auto f = [relation](T s, T t, T w, T& loss, T& slope) __attribute__((always_inline)) {
    relation.pair(s, t, w, loss, slope);
    return relation.weight(s, t, w);
  };
  any_near ? replace<true, kWeighted>(tile, begin, end, sums, row_sums, column_sums, f)
           : replace<false, kWeighted>(tile, begin, end, sums, row_sums, column_sums, f);
}

template <class R, class T>
void slope_weights(const PairsTile<T>& tile, const RelationOptions& options, const RelationSums& known, double error,
                   int64_t begin, int64_t end, bool any_near, T* row_sums, T* column_sums) {
  const R relation(options, known);
  const T factor = T(error);
  const auto f = [relation, factor, options](T s, T, T, T&, T&)
                     __attribute__((always_inline)) { return factor * relation.slope_weight(s, options); };
  RelationSums unused;
  any_near ? replace<true, false>(tile, begin, end, unused, row_sums, column_sums, f)
           : replace<false, false>(tile, begin, end, unused, row_sums, column_sums, f);
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

template <template <class> class Functor, bool kWeighted, class T, class R = Functor<T>>
const PairsKernel<T> kernel = {norms<T>,
                               measures<R, kWeighted, T>,
                               loss<R, kWeighted, T>,
                               weights<R, kWeighted, T>,
                               slope_weights<R, T>,
                               near<T>,
                               R::unclamped_slope,
                               R::matters,
                               R::measures,
                               R::loss_scale};

}  // namespace

template <class T>
const PairsKernel<T>& pairs_kernel(Relation relation, bool weighted) {
  switch (relation) {
#define FASTKD_CASE(name) \
  case Relation::k##name: \
    return weighted ? kernel<name, true, T> : kernel<name, false, T>;
    FASTKD_FOR_EACH_RELATION(FASTKD_CASE)
#undef FASTKD_CASE
    case Relation::kCount:
      break;
  }
  return kernel<RkdDistance, false, T>;  // the binding has refused other numbers
}
template const PairsKernel<float>& pairs_kernel<float>(Relation, bool weighted);
template const PairsKernel<double>& pairs_kernel<double>(Relation, bool weighted);

}  // namespace fastkd::FASTKD_ISA
