// Squared distances of one row to others, from inner products. Near pairs, whose distance would cancel, are
// computed from the rows themselves.
#pragma once
#include <cstdint>

#include "math/distance.h"

namespace fastkd::FASTKD_ISA {

template <class T>
T squared_distance(const T* x, const T* y, int64_t D) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < D; ++k) sum += (x[k] - y[k]) * (x[k] - y[k]);
  return sum;
}

// m[j]: inner products become squared distances; norm, norms[j]: squared, of the rows that were multiplied; x and
// others: the same as they were given, others `stride` apart; self: which of them is x, or negative. Returns whether
// any other is near.
template <class T>
bool squared_distances(T* m, T norm, const T* norms, int64_t columns, int64_t self, const T* x, const T* others,
                       int64_t D, int64_t stride) {
  int near = 0;
#pragma omp simd reduction(+ : near)
  for (int64_t j = 0; j < columns; ++j) {
    const T both = norm + norms[j], squared = both - 2 * m[j];
    near += squared < kNear<T> * both;
    m[j] = squared;
  }
  near -= self >= 0 && self < columns && m[self] < kNear<T> * 2 * norm;
  if (near) {
    for (int64_t j = 0; j < columns; ++j) {
      if (j != self && m[j] < kNear<T> * (norm + norms[j])) m[j] = squared_distance(x, others + j * stride, D);
    }
  }
  return near > 0;
}

}  // namespace fastkd::FASTKD_ISA
