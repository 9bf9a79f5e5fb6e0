// A strip of relation_kl between samples on the CPU. Compiled once per instruction set.
//
//   p_ij = e^(a s_ij) / Z_i of the student, q_ij of the teacher; s_ij = s_ji, so one exponential serves both orders
//   loss = sum_ij weight_i KL(q_i || p_i), w_ij = scale_i (p_ij - q_ij), as math/divergence.h has them
#include "cpu/relation_kl_kernel.h"

#include <algorithm>

#include "math/divergences/kl_div.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kMost = 512;  // columns at a time

template <class T>
struct Exponential {
  explicit Exponential(T scale) : k(scale * kLog2e<T>), lowest(exp2_lowest(scale * kLog2e<T>)) {}
  T operator()(T x) const { return exp2_scaled(x, k, lowest); }
  T k, lowest;
};

template <class T>
void sums(const RelationStrip<T>& P, int64_t begin, int64_t end, double* row_sums, double* column_sums) {
  const Exponential<T> student_exp(P.student_scale), teacher_exp(P.teacher_scale);
  const T* valid = P.valid + P.row;
  T student_columns[kMost] = {}, teacher_columns[kMost] = {};
  for (int64_t i = 0; i < P.rows; ++i) {
    const T *s = P.student + i * P.columns, *t = P.teacher + i * P.columns;
    const T own = valid[i];
    T student = 0, teacher = 0;
#pragma omp simd reduction(+ : student, teacher)
    for (int64_t j = begin; j < end; ++j) {
      const T e = student_exp(s[j]), f = teacher_exp(t[j]);
      student += valid[j] * e;
      teacher += valid[j] * f;
      student_columns[j - begin] += own * e;
      teacher_columns[j - begin] += own * f;
    }
    row_sums[2 * i] += double(student);
    row_sums[2 * i + 1] += double(teacher);
    if (i + 1 < P.rows && i % 64 != 63) continue;  // short sums, then in double
    for (int64_t j = begin; j < end; ++j) {
      if (j >= P.rows) {  // the other order of what is among the strip's own rows is there as well
        column_sums[2 * j] += double(student_columns[j - begin]);
        column_sums[2 * j + 1] += double(teacher_columns[j - begin]);
      }
      student_columns[j - begin] = teacher_columns[j - begin] = 0;
    }
  }
}

// Of a row's columns: exponentials and w but for the difference of logarithms.
template <class T>
struct Room {
  T student[kMost], teacher[kMost], w[kMost];
};

// What one sample says of a pair: that of the row, or that of the column.
template <class T>
struct One {
  T student_inverse, teacher_inverse, difference;
};

template <class T>
FASTKD_HD Element<T> element(T e, T f, T w, T valid, One<T> one) {
  return {e * one.student_inverse * valid, f * one.teacher_inverse * valid, w - one.difference};
}

// One order of the pairs in a loop: with both it is not vectorised.
template <class T>
double of_row(const Room<T>& room, const T* valid, One<T> one, T weight, T scale, int64_t n, T* s) {
  const ForwardKL<T> divergence;
  const T *e = room.student, *f = room.teacher, *w = room.w;
  T loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t j = 0; j < n; ++j) {
    loss += divergence.loss(element(e[j], f[j], w[j], valid[j], one));
    s[j] = scale * divergence.slope(element(e[j], f[j], w[j], valid[j], one));
  }
  return double(weight * loss);
}

template <class T>
double of_columns(const Room<T>& room, T valid, const RelationRows<T>& R, int64_t first, int64_t n, T* s) {
  const ForwardKL<T> divergence;
  const T *e = room.student, *f = room.teacher, *w = room.w;
  const T *inverse = R.student_inverse + first, *teacher_inverse = R.teacher_inverse + first;
  const T *difference = R.difference + first, *weight = R.weight + first, *scale = R.scale + first;
  T losses[kMost], slopes[kMost], loss = 0;  // what is weighed in the same loop is not vectorised
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    losses[j] = divergence.loss(element(e[j], f[j], w[j], valid, {inverse[j], teacher_inverse[j], difference[j]}));
    slopes[j] = divergence.slope(element(e[j], f[j], w[j], valid, {inverse[j], teacher_inverse[j], difference[j]}));
  }
#pragma omp simd reduction(+ : loss)
  for (int64_t j = 0; j < n; ++j) {
    loss += weight[j] * losses[j];
    s[j] += scale[j] * slopes[j];
  }
  return double(loss);
}

// both: add the loss of the transposed pairs (j, i) as well. It is set for columns beyond this strip's rows, as no
// other strip visits them.
template <class T>
double weights_of_row(const RelationStrip<T>& P, const RelationRows<T>& R, int64_t i, int64_t begin, int64_t end,
                      bool both) {
  if (begin == end) return 0;
  const Exponential<T> student_exp(P.student_scale), teacher_exp(P.teacher_scale);
  const T student_scale = P.student_scale, teacher_scale = P.teacher_scale;
  T* s = P.student + i * P.columns + begin;
  const T* t = P.teacher + i * P.columns + begin;
  const int64_t n = end - begin, own = P.row + i, first = P.row + begin;
  Room<T> room;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    room.student[j] = student_exp(s[j]);
    room.teacher[j] = teacher_exp(t[j]);
    room.w[j] = student_scale * s[j] - teacher_scale * t[j];
  }
  const One<T> one{R.student_inverse[own], R.teacher_inverse[own], R.difference[own]};
  const double loss = of_row(room, P.valid + first, one, R.weight[own], R.scale[own], n, s);
  const double other = of_columns(room, P.valid[own], R, first, n, s);
  return both ? loss + other : loss;
}

template <class T>
double weights(const RelationStrip<T>& P, const RelationRows<T>& R, int64_t begin, int64_t end) {
  const int64_t middle = std::clamp(P.rows, begin, end);
  double loss = 0;
  for (int64_t i = 0; i < P.rows; ++i) {
    loss += weights_of_row(P, R, i, begin, middle, false) + weights_of_row(P, R, i, middle, end, true);
  }
  return loss;
}

template <class T>
const RelationKLKernel<T> kernel = {sums<T>, weights<T>};

}  // namespace

template <class T>
const RelationKLKernel<T>& relation_kl_kernel() {
  return kernel<T>;
}
template const RelationKLKernel<float>& relation_kl_kernel<float>();
template const RelationKLKernel<double>& relation_kl_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
