// What is done to one tile of pairs, compiled for one instruction set, as the schedule sees it.
#pragma once
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

// Pairs of a block of rows i with a block of rows j, of one side: first their inner products, then
// their distances, then (of the student) their weights.
template <class T>
struct PairsSide {
  T* tile;           // [rows, stride]
  const T* x_i;      // [rows, D], their rows x_stride apart; not centred: what differs there is exact
  const T* x_j;      // [columns, D]
  const T* norms_i;  // [rows], squared, of the centred
  const T* norms_j;  // [columns]
  int64_t D, x_stride;
};

template <class T>
struct PairsTile {
  PairsSide<T> student, teacher;
  int64_t rows, columns, stride;
  int64_t diagonal;  // row i = 0 is column `diagonal`; negative: no row meets itself
};

// What the relation needs to know of all pairs before it can weigh one.
template <class T>
struct PairsStatistics {
  T student_scale, teacher_scale;  // 1 / mean distance
  T shift;                         // C: the gradient through the student's mean
  T delta;
};

// Sums over the ordered pairs of a tile.
struct PairsSums {
  double student = 0, teacher = 0;          // distances
  double student_squared = 0, product = 0;  // d_s^2, d_s d_t
  double loss = 0, shift = 0;               // Huber, r d_s / mu

  FASTKD_HD void add(const PairsSums& o, double times) {
    student += times * o.student;
    teacher += times * o.teacher;
    student_squared += times * o.student_squared;
    product += times * o.product;
    loss += times * o.loss;
    shift += times * o.shift;
  }
};

// Each over the rows begin .. end of a tile.
template <class T>
struct PairsKernel {
  // squared norms of rows [n, D]
  void (*norms)(const T* x, int64_t n, int64_t D, T* norms);
  // inner products become distances; sums.student, teacher, student_squared, product. Returns whether
  // any two of the student's rows are near.
  bool (*distances)(const PairsTile<T>&, int64_t begin, int64_t end, PairsSums& sums);
  // sums.loss and shift
  void (*loss)(const PairsTile<T>&, const PairsStatistics<T>&, int64_t begin, int64_t end, PairsSums& sums);
  // the same, and the student's distances become weights; row_sums[i] += , column_sums[j] += . Where any
  // are near, weights of near pairs go into the teacher's tile, and 0 where they were
  void (*weights)(const PairsTile<T>&, const PairsStatistics<T>&, int64_t begin, int64_t end, bool any_near,
                  PairsSums& sums, T* row_sums, T* column_sums);
  // the student's distances become their inverses, which are the weights of -C
  void (*inverses)(const PairsTile<T>&, int64_t begin, int64_t end, bool any_near, T* row_sums, T* column_sums);
  // of the weights in the teacher's tile: out_i [rows, D] -= w (x_i - x_j), out_j [columns, D] += that
  void (*near)(const PairsTile<T>&, int64_t begin, int64_t end, T* out_i, T* out_j);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const PairsKernel<T>& pairs_kernel();
}
namespace avx2 {
template <class T>
const PairsKernel<T>& pairs_kernel();
}
namespace avx512 {
template <class T>
const PairsKernel<T>& pairs_kernel();
}

}  // namespace fastkd
