// What the kernels of the rows schedule share: what a row's sums come to, and the step from logits to loss and
// gradient.
#pragma once
#include "cuda/rows_sums.cuh"
#include "cuda/rows_targets.cuh"
#include "divergence_functors.h"
#include "math/two_classes.h"

namespace fastkd::cuda {

// Sums that the lanes of a warp combine, for combine_over_row.
template <class T, bool kEntropy>
struct SharedSums {
  Sums<T> sums;
  T exp2_student, exp2_teacher;

  static __device__ SharedSums empty() { return {Sums<T>::empty(), T(0), T(0)}; }
  static __device__ SharedSums combine(SharedSums x) {
    Sums<T>& k = x.sums;
    // an empty lane has no scale of its own
    x.exp2_student = warp_max(x.exp2_student);
    x.exp2_teacher = warp_max(x.exp2_teacher);
    const T max_student = warp_max(k.max_student), max_teacher = warp_max(k.max_teacher);
    const T up = max_teacher - k.max_teacher, before = k.sum_teacher;
    moved(k.max_student, k.sum_student, max_student, x.exp2_student);
    const T factor = moved(k.max_teacher, k.sum_teacher, max_teacher, x.exp2_teacher);
    k.sum_student = warp_sum(k.sum_student);
    k.sum_teacher = warp_sum(k.sum_teacher);
    if constexpr (kEntropy) k.entropy = warp_sum(before == T(0) ? T(0) : factor * (k.entropy + before * up));
    return x;
  }
};

// What the second pass adds up.
template <class T>
struct LossSums {
  T loss, slope;
  T second;  // of a divergence that has two sums

  static __device__ LossSums empty() { return {T(0), T(0), T(0)}; }
  static __device__ LossSums combine(LossSums x) { return {warp_sum(x.loss), warp_sum(x.slope), warp_sum(x.second)}; }
  __device__ void add(const LossSums& x) {
    loss += x.loss;
    slope += x.slope;
    second += x.second;
  }
};

// What a row's sums come to: the second becomes what its slopes are multiplied by.
template <class T, class D>
__device__ __forceinline__ LossSums<T> of_row(LossSums<T> sums) {
  if constexpr (kTwoSums<D>) {
    const RowOfSums<T> row = D::row(sums.loss, sums.second);
    return {row.loss, row.loss == kInf<T> ? kInf<T> : sums.slope, row.factor};
  }
  return sums;
}

// Where every class is by itself none is impossible, and no sum over them is asked for.
template <class D, class T>
__device__ __forceinline__ Sums<T> sums_of_softmax(Sums<T> k, bool counts) {
  if (given<D>() == Given::kLogOdds && counts) k.sum_student = k.sum_teacher = T(1);
  return k;
}

// From logits to p, q and w of a row whose sums are known.
template <class T>
struct RowSoftmax {
  T max_student, max_teacher, log2_student, log2_teacher;
  T exp2_student, exp2_teacher;
  T over_student, over_teacher;  // 1 / sum
  T centre_student, centre_teacher, a, b, offset;

  __device__ RowSoftmax(const RowConstants<T>& r, T max_student, T sum_student, T max_teacher, T sum_teacher)
      : max_student(max_student),
        max_teacher(max_teacher),
        exp2_student(r.exp2_student),
        exp2_teacher(r.exp2_teacher),
        over_student(T(1) / sum_student),
        over_teacher(T(1) / sum_teacher),
        a(r.inv_temperature),
        b(r.b) {
    log2_student = log_of(sum_student) * kLog2e<T>;
    log2_teacher = log_of(sum_teacher) * kLog2e<T>;
    // Where student and teacher differ by a constant, which changes nothing, s - t would be
    // rounded at the size of that constant: there both are taken from their maxima. Else s - t
    // itself is the most exact, and near convergence it is what counts.
    const T shift = max_student - max_teacher;
    const bool centred = b != T(0) || shift > T(4) || shift < T(-4);
    centre_student = centred ? max_student : T(0);
    centre_teacher = centred ? max_teacher : T(0);
    offset = (centred ? T(0) : shift * a) + log_of(sum_student / sum_teacher);
  }
  __device__ __forceinline__ Element<T> operator()(T s, T t) const { return of<Given::kProbabilities>(s, t); }
  // kBySums: p and q are exponentials over their sums. Of the logarithms of the sums, which are fewer instructions, a
  // rounding is in all of a row's p.
  template <Given kGiven, bool kBySums = false>
  __device__ __forceinline__ Element<T> of(T s, T t) const {
    constexpr T kLog2 = T(0.69314718055994530942);
    Element<T> e;
    if constexpr (kGiven == Given::kLogOdds) {
      e.p = s * a;
      e.q = t * (exp2_teacher * kLog2);
      e.w = (s - t) * a + (t > -kInf<T> ? t : T(0)) * b;
      return e;
    }
    e.p = (s - max_student) * exp2_student - (kBySums ? T(0) : log2_student);
    e.q = (t - max_teacher) * exp2_teacher - (kBySums ? T(0) : log2_teacher);
    if constexpr (kGiven == Given::kLogs) {
      e.p *= kLog2;
      e.q *= kLog2;
    } else {
      e.p = exp2_of(e.p) * (kBySums ? over_student : T(1));
      e.q = exp2_of(e.q) * (kBySums ? over_teacher : T(1));
    }
    const T x = s - centre_student, y = t - centre_teacher;
    const T lowest = T(-1e30);  // a teacher's -inf must not meet b = 0 or a b > 0
    e.w = (x - y) * a + ((y > lowest ? y : lowest) * b - offset);
    return e;
  }
};

// What a target that is parted from the others has in its row's loss.
template <class T>
__device__ TargetPart<T> target_part(const RowsParams<T>& P, const RowConstants<T>& r, const Sums<T>& k,
                                     const HardSums<T>& hard) {
  if (k.sum_teacher == T(0) && hard.teacher_logit == -kInf<T>) return {T(0), T(0)};
  if (k.sum_student == T(0) && hard.logit == -kInf<T>) return {kInf<T>, T(0)};
  const T logit = hard.logit < kInf<T> ? hard.logit : kInf<T> - kInf<T>;
  const T teacher_logit = hard.teacher_logit < kInf<T> ? hard.teacher_logit : kInf<T> - kInf<T>;
  const T student = logit - k.max_student, teacher = teacher_logit - k.max_teacher;
  if (P.hard.loss == TargetLoss::kDecoupled) {
    const RowSoftmax<T> softmax(r, k.max_student, k.sum_student, k.max_teacher, k.sum_teacher);
    return TargetPart<T>::of(true, student * r.inv_temperature - log_of(k.sum_student),
                             teacher * r.inv_teacher_temperature - log_of(k.sum_teacher),
                             softmax(logit, teacher_logit).w);
  }
  const T a = student - log_of(hard.sum), b = teacher - log_of(hard.sum_teacher);
  return TargetPart<T>::of(false, a, b, a - b);
}

// Of a row whose sums are known, its hard loss.
template <bool kParted, class T>
__device__ HardRow<T> hard_row(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r, const Sums<T>& k,
                               const HardSums<T>& hard) {
  if constexpr (kParted) return HardRow<T>::parted(P, row, r, k, hard.sum, target_part(P, r, k, hard).factor);
  return HardRow<T>(P, row, r, k.max_student, hard.sum);
}
// The same from what forward has saved.
template <bool kParted, class T>
__device__ HardRow<T> hard_row(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r, const RowsStats& saved) {
  const T max = T(saved.max_student), sum = T(saved.sum_hard);
  if constexpr (kParted) {
    return HardRow<T>::parted(P, row, r, {max, T(saved.sum_student), T(0), T(0), T(0)}, sum, T(saved.factor));
  }
  return HardRow<T>(P, row, r, max, sum);
}

}  // namespace fastkd::cuda
