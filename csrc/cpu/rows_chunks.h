// What the passes of the rows schedule do with a chunk of a row, which lies in the first-level cache: see
// rows_kernel.cpp.
#pragma once
#include "cpu/rows_kernel.h"
#include "cpu/rows_math.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class T>
T maximum(const T* x, int64_t n) {
  // four maxima at once: one alone would wait for itself
  const int64_t quarter = n / (4 * kLanes) * kLanes;
  T m0 = -kInf<T>, m1 = m0, m2 = m0, m3 = m0;
#pragma omp simd reduction(max : m0, m1, m2, m3)
  for (int64_t i = 0; i < quarter; ++i) {
    m0 = x[i] > m0 ? x[i] : m0;
    m1 = x[quarter + i] > m1 ? x[quarter + i] : m1;
    m2 = x[2 * quarter + i] > m2 ? x[2 * quarter + i] : m2;
    m3 = x[3 * quarter + i] > m3 ? x[3 * quarter + i] : m3;
  }
#pragma omp simd reduction(max : m0)
  for (int64_t i = 4 * quarter; i < n; ++i) m0 = x[i] > m0 ? x[i] : m0;
  m0 = m1 > m0 ? m1 : m0;
  m2 = m3 > m2 ? m3 : m2;
  return m2 > m0 ? m2 : m0;
}

// x, n classes, without one of them, in memory of the caller's. Its logit is handed over.
template <class T>
const T* without(int64_t target, const T* x, int64_t n, T* memory, double& logit) {
  if (x != memory) std::memcpy(memory, x, size_t(n) * sizeof(T));
  logit = double(memory[target]);
  memory[target] = -kInf<T>;
  return memory;
}

// What the first pass makes of a chunk: e^((z - max) / T) of both sides, added to the sums, and
// the difference of student and teacher.
template <class D, class T>
void first_pass_chunk(const T* s, const T* t, int64_t n, const Row<T>& r, RowsStats& sums, T* exp_student,
                      T* exp_teacher, T* difference) {
  const Row<T> k = r;  // by value: the stores below could otherwise change it
  const T max_student = T(sums.max_student), max_teacher = T(sums.max_teacher);
  const T centre_student = T(centre_of(sums).student), centre_teacher = T(centre_of(sums).teacher);
  T sum_student = 0, sum_teacher = 0;
#pragma omp simd reduction(+ : sum_student, sum_teacher)
  for (int64_t i = 0; i < n; ++i) {
    exp_student[i] = kept_of<given<D>()>(s[i], max_student, k.scale_student, k.lowest_student, k.a, sum_student);
    exp_teacher[i] =
        kept_of<given<D>()>(t[i], max_teacher, k.scale_teacher, k.lowest_teacher, k.a_teacher, sum_teacher);
    difference[i] = difference_of(s[i] - centre_student, t[i] - centre_teacher, k.a, k.b);
  }
  if (given<D>() == Given::kLogOdds) sum_student = sum_teacher = T(1);  // none is needed, and all is possible
  sums.sum_student += double(sum_student);
  sums.sum_teacher += double(sum_teacher);
}

// sum e^((t - max) / T_teacher) (max - t), every term >= 0
template <class T>
double entropy_chunk(const T* t, const T* exp_teacher, int64_t n, T max_teacher) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exp_teacher[i] == T(0) ? T(0) : exp_teacher[i] * (max_teacher - t[i]);
  return double(sum);
}

// The sum of e^(z - max) of the student: of powers of what is there, or of what comes to stand at exp_hard.
template <class T>
double hard_chunk(const T* s, int64_t n, double max, int power, const T* exp_student, T* exp_hard) {
  T sum = 0;
  if (power > 0) {
    with_hard_power(power, [&](auto k) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += power_of<k.value>(exp_student[i]);
    });
    return double(sum);
  }
  const T from = T(max), scale = kLog2e<T>, lowest = exp2_lowest(scale);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    exp_hard[i] = exp2_scaled(s[i] - from, scale, lowest);
    sum += exp_hard[i];
  }
  return double(sum);
}

// The sum of z - max of the student: that of z itself would have lost its digits where all share a constant.
template <class T>
double logits_chunk(const T* s, int64_t n, double max) {
  const T from = T(max);
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += s[i] - from;
  return double(sum);
}

// Adds what the hard loss has for the classes first .. first + n.
template <class T>
void add_hard(const RowsParams<T>& P, int64_t row, const HardScale<T>& k, int power, const T* exp_student,
              const T* exp_hard, int64_t first, int64_t n, T* grad) {
  const HardScale<T> by = k;  // by value: the stores below could otherwise change it
  const T* of = power > 0 ? exp_student : exp_hard;
  with_hard_power(power, [&](auto constant) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) grad[i] += power_of<constant.value>(of[i]) * by.p - by.everywhere;
  });
  const int64_t target = P.hard.target[row] - first;
  if (target >= 0 && target < n) grad[target] -= by.target;
}

template <class T, class D>
void gradient_chunk(D divergence, const T* exp_student, const T* exp_teacher, const T* difference, int64_t n,
                    Scale<T> k, T* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T slope = element_slope(divergence, exp_student[i], exp_teacher[i], difference[i], k);
    grad[i] = (D::kCentred ? slope : slope - probability<given<D>()>(exp_student[i], k.p) * k.slope) * k.grad;
  }
}

// Adds to the block's loss; and, where they have a sum, to that of its slopes, which take the
// place of the difference.
template <class T, class D>
void reduce_chunk(D divergence, const T* exp_student, const T* exp_teacher, T* difference, int64_t n, Scale<T> k,
                  RowsBlock& block) {
  T loss = 0, slopes = 0, second = 0;
#pragma omp simd reduction(+ : loss, slopes, second)
  for (int64_t i = 0; i < n; ++i) {
    loss += element_loss(divergence, exp_student[i], exp_teacher[i], difference[i], k);
    second += element_second(divergence, exp_student[i], exp_teacher[i], difference[i], k);
    if constexpr (!D::kCentred) {
      const T slope = element_slope(divergence, exp_student[i], exp_teacher[i], difference[i], k);
      slopes += slope;
      difference[i] = slope;
    }
  }
  block.loss += double(loss);
  block.slope += double(slopes);
  block.second += double(second);
}

// The same for a divergence whose slopes add up to 0, with the gradient.
template <class T, class D>
void reduce_chunk_to_grad(D divergence, const T* exp_student, const T* exp_teacher, const T* difference, int64_t n,
                          Scale<T> k, RowsBlock& block, T* grad) {
  T loss = 0;
#pragma omp simd reduction(+ : loss)
  for (int64_t i = 0; i < n; ++i) {
    loss += element_loss(divergence, exp_student[i], exp_teacher[i], difference[i], k);
    grad[i] = element_slope(divergence, exp_student[i], exp_teacher[i], difference[i], k) * k.grad;
  }
  block.loss += double(loss);
}

// From slopes to the gradient.
template <Given kGiven, class T>
void slopes_chunk(const T* exp_student, const T* slope, int64_t n, Scale<T> k, T* grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = (slope[i] - probability<kGiven>(exp_student[i], k.p) * k.slope) * k.grad;
  }
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
