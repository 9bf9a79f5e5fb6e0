// A strip of cosines of probabilistic knowledge transfer, compiled for one instruction set, as the op sees it.
#pragma once
#include <cstdint>

namespace fastkd {

// The rows row .. row + rows of all pairs, from the diagonal on: column j is sample row + j. What is said of
// samples is [N]: valid 1 or 0; the inverses of their sums of similarities, weights of their losses and factors of
// their gradients are 0 where a sample is not there.
template <class T>
struct PktStrip {
  T* student;  // cosines [rows, stride]; become weights w_ij + w_ji of the gradient's sum over unit vectors
  const T* teacher;
  int64_t rows, stride, row;
  const T *valid, *student_inverse, *teacher_inverse, *weight, *scale;
  T eps;
};

template <class T>
struct PktKernel {
  // The columns begin .. end. row_slopes[i] += , column_slopes[j - begin] += what each sample's slope is; returns
  // the loss. Pairs beyond the strip's own rows count in both orders.
  double (*columns)(const PktStrip<T>&, int64_t begin, int64_t end, T* row_slopes, T* column_slopes);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const PktKernel<T>& pkt_kernel();
}
namespace avx2 {
template <class T>
const PktKernel<T>& pkt_kernel();
}
namespace avx512 {
template <class T>
const PktKernel<T>& pkt_kernel();
}

}  // namespace fastkd
