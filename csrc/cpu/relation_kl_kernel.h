// Strips of relation_kl between samples, compiled for one instruction set, as the ops see them.
#pragma once
#include <cstdint>

namespace fastkd {

// The rows row .. row + rows of all pairs, from the diagonal on: column j is sample row + j. Products are symmetric, so
// both orders of a pair are here. What is said of samples is [N].
template <class T>
struct RelationStrip {
  T* student;  // products [rows, columns], -inf where a sample meets itself that shall not
  T* teacher;
  int64_t rows, columns, row;
  T student_scale, teacher_scale;  // of products: similarities; their exponentials are numbers
  const T* valid;                  // 1 or 0
};

// What follows from the sums of all exponentials of a sample.
template <class T>
struct RelationRows {
  const T *student_inverse, *teacher_inverse;  // of these sums; 0 where there are none
  const T* difference;                         // of their logarithms
  const T *weight, *scale;                     // of a sample's own terms in the loss, and in the gradient of products
};

template <class T>
struct RelationKLKernel {
  // The columns begin .. end of the sums of exponentials: row_sums[2 i] += , column_sums[2 j] += , of student and
  // teacher.
  void (*sums)(const RelationStrip<T>&, int64_t begin, int64_t end, double* row_sums, double* column_sums);
  // The student's products become weights w_ij + w_ji; returns the loss. Pairs beyond the strip's own rows count in
  // both orders.
  double (*weights)(const RelationStrip<T>&, const RelationRows<T>&, int64_t begin, int64_t end);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const RelationKLKernel<T>& relation_kl_kernel();
}
namespace avx2 {
template <class T>
const RelationKLKernel<T>& relation_kl_kernel();
}
namespace avx512 {
template <class T>
const RelationKLKernel<T>& relation_kl_kernel();
}

}  // namespace fastkd
