// A strip of cosines on the CPU: both orders of a pair from one similarity per side. Compiled once per instruction set.
#include "cpu/pkt_kernel.h"

#include <algorithm>

#include "math/pkt.h"

namespace fastkd::FASTKD_ISA {
namespace {

// kBoth: what lies beyond the strip's own rows, where nobody else will count the other order.
template <bool kBoth, class T>
double columns_of_row(const PktStrip<T>& P, int64_t i, int64_t begin, int64_t end, T* row_slope, T* column_slopes) {
  T* s = P.student + i * P.stride;
  const T* t = P.teacher + i * P.stride;
  const T *valid = P.valid + P.row, *inverse = P.student_inverse + P.row, *teacher_inverse = P.teacher_inverse + P.row;
  const T *weight = P.weight + P.row, *scale = P.scale + P.row;
  const T valid_i = valid[i], inverse_i = inverse[i], teacher_inverse_i = teacher_inverse[i];
  const T weight_i = weight[i], scale_i = scale[i], eps = P.eps;
  T loss = 0, slope = 0;
#pragma omp simd reduction(+ : loss, slope)
  for (int64_t j = begin; j < end; ++j) {
    const T both = valid_i * valid[j];
    const T k = pkt_similarity(s[j], both), h = pkt_similarity(t[j], both);
    const T a = pkt_pair(k * inverse_i, h * teacher_inverse_i, eps, weight_i, loss, slope);
    T other_loss = 0, other_slope = 0;
    const T b = pkt_pair(k * inverse[j], h * teacher_inverse[j], eps, weight[j], other_loss, other_slope);
    if constexpr (kBoth) {
      loss += other_loss;
      column_slopes[j] += other_slope;
    }
    s[j] = scale_i * a + scale[j] * b;
  }
  *row_slope += slope;
  return double(loss);
}

template <class T>
double columns(const PktStrip<T>& P, int64_t begin, int64_t end, T* row_slopes, T* column_slopes) {
  const int64_t middle = std::clamp(P.rows, begin, end);
  double loss = 0;
  for (int64_t i = 0; i < P.rows; ++i) {
    loss += columns_of_row<false>(P, i, begin, middle, row_slopes + i, column_slopes - begin);
    loss += columns_of_row<true>(P, i, middle, end, row_slopes + i, column_slopes - begin);
  }
  return loss;
}

template <class T>
const PktKernel<T> kernel = {columns<T>};

}  // namespace

template <class T>
const PktKernel<T>& pkt_kernel() {
  return kernel<T>;
}
template const PktKernel<float>& pkt_kernel<float>();
template const PktKernel<double>& pkt_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
