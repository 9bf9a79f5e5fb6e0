// What is done to triples on one thread, compiled for one instruction set, as the schedule sees it.
#pragma once
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

// What is known of vertex a and every other row i, [stride] each, one after the other. Both sides are
// scaled, which no angle sees; differences are student - teacher.
enum AnglesArray : int64_t {
  kStudentInverse,  // q = 1 / |x_a - x_i|, 0 where they are equal
  kTeacherInverse,
  kInverseDifference,
  kHalf,  // h = |x_a - x_i|^2 / 2, of the student
  kHalfDifference,
  kAlpha,  // sum_k r q_ak; then the weights
  kBeta,   // sum_k r psi
  kKappa,  // K as its sum with its transpose gives it: what is above the diagonal
  kAnglesArrays
};

// The vertices of a strip. Columns beyond N are 0: there r is 0.
template <class T>
struct AnglesStrip {
  T* memory;  // [vertices, kAnglesArrays, stride]
  int64_t stride;
  int64_t begin, vertices;  // the first vertex is row `begin` of the embeddings

  FASTKD_HD T* row(int64_t vertex, int64_t array) const { return memory + (vertex * kAnglesArrays + array) * stride; }
};

// Pairs (i, k) of a block of rows with the same or another one.
template <class T>
struct AnglesTile {
  const T *half, *half_difference;  // [rows, stride]
  int64_t stride;
  T* kappa;  // [rows, kappa_stride], += sum_a r q_ai q_ak, halved where it is counted twice; null: no gradient
  int64_t kappa_stride;
  int64_t row, rows;        // the first i; how many, padded
  int64_t column, columns;  // the same of k
  T delta;
};

// Inner products of a tile, which become squared distances.
struct AnglesGram {
  double* tile;  // [rows, columns]
  const double *x_i, *x_k;
  const double *norms_i, *norms_k;
  int64_t rows, columns, D;
  bool diagonal;
};

// The squared distances of a tile, [rows, columns], and what they are multiplied by.
struct AnglesSides {
  const double *student, *teacher;
  double student_scale, teacher_scale;
  int64_t rows, columns;
};

// Of squared distances that are not 0.
struct AnglesRange {
  double least_student, largest_student, least_teacher, largest_teacher;
  double largest_ratio;  // student / teacher
};

template <class T>
struct AnglesKernel {
  // squared norms of rows [n, D]
  void (*norms)(const double* x, int64_t n, int64_t D, double* norms);
  void (*distances)(const AnglesGram&);
  // all arrays before kAlpha: vertices from `vertex` on, columns from `column` on
  AnglesRange (*fill)(const AnglesSides&, const AnglesStrip<T>&, int64_t vertex, int64_t column);
  // the same for a tile [rows, stride] outside the strip, which needs no inverses
  void (*halves)(const AnglesSides&, T* half, T* half_difference, int64_t stride);
  // the sum of the losses of ordered triples, vertices begin .. end
  double (*sweep)(const AnglesStrip<T>&, const AnglesTile<T>&, int64_t begin, int64_t end);
  // columns begin .. end of alpha become q alpha - q^2 beta - K; sums[i] += their sum
  void (*weights)(const AnglesStrip<T>&, int64_t begin, int64_t end, double* sums);
  double (*sum)(const T* x, int64_t n);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const AnglesKernel<T>& angles_kernel();
}
namespace avx2 {
template <class T>
const AnglesKernel<T>& angles_kernel();
}
namespace avx512 {
template <class T>
const AnglesKernel<T>& angles_kernel();
}

}  // namespace fastkd
