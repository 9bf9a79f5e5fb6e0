// What a target adds to a row of the rows schedule: the sums of its hard loss, the loss, and its gradient.
#pragma once
#include "cuda/rows_sums.cuh"

namespace fastkd::cuda {

// What the cross-entropy with a row's target adds up, beside its Sums.
template <class T>
struct HardSums {
  T sum;                         // e^(z - max) of the student, with the maximum of the Sums
  T logits, count;               // z - max, where labels are smoothed, of so many classes
  T logit;                       // the target's z, of the one thread that reads it
  T teacher_logit, sum_teacher;  // where the target is parted: of the teacher, at temperature 1

  static __device__ HardSums empty() { return {T(0), T(0), T(0), T(0), T(0), T(0)}; }
  static __device__ HardSums combine(HardSums x) {
    return {warp_sum(x.sum),   warp_sum(x.logits),        warp_sum(x.count),
            warp_sum(x.logit), warp_sum(x.teacher_logit), warp_sum(x.sum_teacher)};
  }
  __device__ void add(const HardSums& x) {
    sum += x.sum;
    logits += x.logits;
    count += x.count;
    logit += x.logit;
    teacher_logit += x.teacher_logit;
    sum_teacher += x.sum_teacher;
  }
  __device__ __forceinline__ void move(T max, T higher) {
    if (count > T(0)) logits += count * (max - higher);
  }
};

// The same classes, for both; count of them are there, and the others are -inf.
template <class T, int kCount, bool kEntropy, bool kParted = false>
__device__ __forceinline__ void add(Sums<T>& sums, HardSums<T>& hard, const T (&s)[kCount], const T (&t)[kCount],
                                    const RowConstants<T>& r, const HardTargets& targets, int count = kCount) {
  const T before = sums.max_student, teacher_before = sums.max_teacher;
  add<T, kCount, kEntropy>(sums, s, t, r);
  if (!targets.target || (kParted && targets.loss == TargetLoss::kDecoupled)) return;
  if (r.inv_temperature != T(1)) {  // else the sum is the student's own
    if (sums.max_student > before) hard.sum *= exp2_of((before - sums.max_student) * kLog2e<T>);
#pragma unroll
    for (int i = 0; i < kCount; ++i) hard.sum += exp2_of((s[i] - sums.max_student) * kLog2e<T>);
  }
  if (kParted && r.inv_teacher_temperature != T(1)) {
    if (sums.max_teacher > teacher_before) {
      hard.sum_teacher *= exp2_of((teacher_before - sums.max_teacher) * kLog2e<T>);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) hard.sum_teacher += exp2_of((t[i] - sums.max_teacher) * kLog2e<T>);
  }
  if (!kParted && targets.smoothing != 0) {
    hard.move(before, sums.max_student);
    hard.count += T(count);
#pragma unroll
    for (int i = 0; i < kCount; ++i) hard.logits += i < count ? s[i] - sums.max_student : T(0);
  }
}

// Of a thread or a part of a row, with the maxima of the whole row.
template <bool kParted, class T>
__device__ __forceinline__ HardSums<T> rebased(HardSums<T> hard, const Sums<T>& own, const Sums<T>& row) {
  hard.sum *= exp2_of((own.max_student - row.max_student) * kLog2e<T>);
  if constexpr (kParted) {
    hard.sum_teacher *= exp2_of((own.max_teacher - row.max_teacher) * kLog2e<T>);
  } else {
    hard.move(own.max_student, row.max_student);
  }
  return hard;
}
// Of a whole row: what is at temperature 1 already. row: its sums as they are, also where sums_of_softmax has others.
template <bool kParted, class T>
__device__ __forceinline__ HardSums<T> completed(HardSums<T> hard, const Sums<T>& row, const RowConstants<T>& r) {
  if (r.inv_temperature == T(1)) hard.sum = row.sum_student;
  if (kParted && r.inv_teacher_temperature == T(1)) hard.sum_teacher = row.sum_teacher;
  return hard;
}

// Classes v, v + step, ... without the target where it is parted from them.
template <bool kParted, class T, int kCount>
__device__ __forceinline__ void leave_out(int64_t target, int64_t v, int64_t step, T (&s)[kCount], T (&t)[kCount]) {
  if constexpr (kParted) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (v + i * step == target) s[i] = t[i] = -kInf<T>;
    }
  }
}
template <bool kParted, class T>
__device__ __forceinline__ int64_t parted_target(const RowsParams<T>& P, int64_t row) {
  return kParted ? P.hard.target[row] : -1;
}

// From a logit to what the hard loss adds to its gradient, of a row whose sums are known.
template <class T>
struct HardRow {
  T max, log2_sum;
  T scale, everywhere, of_target;
  T exp2_scale;    // where the target is parted; else log2(e)
  int64_t target;  // -1: the row has no hard loss

  __device__ HardRow() : max(0), log2_sum(0), scale(0), everywhere(0), of_target(0), exp2_scale(0), target(-1) {}
  __device__ HardRow(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r, T max, T sum)
      : max(max), exp2_scale(kLog2e<T>), target(P.hard.target[row]) {
    log2_sum = sum == T(0) ? T(0) : log_of(sum) * kLog2e<T>;
    // of -inf alone: no finite step makes a class possible
    scale = sum == T(0) ? T(0) : r.hard_grad_scale;
    if (!P.hard.is_class(target, P.V)) {
      target = 0;
      scale = kInf<T> - kInf<T>;  // as loud as the host, which cannot look, may be
    }
    everywhere = scale * T(P.hard.smoothing) / T(P.hard.classes);
    of_target = scale * T(1 - P.hard.smoothing);
    if (target < 0) target = P.V;  // a class that is not here
  }
  // Of a target that is parted from the others, of which these are the sums. factor: see TargetLoss.
  static __device__ HardRow parted(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r, const Sums<T>& k,
                                   T sum_hard, T factor) {
    const bool decoupled = P.hard.loss == TargetLoss::kDecoupled;
    HardRow hard(P, row, r, k.max_student, decoupled ? k.sum_student : sum_hard);
    hard.scale *= factor;
    hard.of_target = hard.scale;
    hard.everywhere = T(0);
    if (decoupled) hard.exp2_scale = r.exp2_student;
    return hard;
  }
  // Classes v, v + step, ...
  template <bool kParted, int kCount>
  __device__ __forceinline__ void add(const T (&s)[kCount], int64_t v, int64_t step, T (&grad)[kCount]) const {
    if (target < 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool is_target = v + i * step == target;
      if constexpr (kParted) {
        grad[i] += is_target ? -of_target : exp2_of((s[i] - max) * exp2_scale - log2_sum) * scale;
      } else {
        grad[i] += exp2_of((s[i] - max) * kLog2e<T> - log2_sum) * scale - everywhere;
        if (is_target) grad[i] -= of_target;
      }
    }
  }
};

// Cross-entropy with the target of a row.
template <class T>
__device__ T hard_loss(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r, const HardSums<T>& hard, T max) {
  const int64_t target = P.hard.target[row];
  if (target < 0 || target >= P.V) return kInf<T> - kInf<T>;
  if (P.hard.hard_weight == 0) return T(0);  // leaves out what may be infinite
  if (hard.sum == T(0)) return kInf<T>;
  const T smoothing = T(P.hard.smoothing);
  T loss = log_of(hard.sum);
  if (smoothing < T(1)) loss += (T(1) - smoothing) * (max - hard.logit);
  if (smoothing > T(0)) loss -= smoothing * hard.logits / T(P.V);
  return loss * r.hard_loss_scale;
}

// The target's logits, for one thread of a row. Before the gradient is written, perhaps over the student.
template <bool kParted, class S, class U, class T>
__device__ void read_target(const RowsParams<T>& P, int64_t row, const char* student, const char* teacher,
                            HardSums<T>& hard) {
  const int64_t target = P.hard.target[row];
  if (target < 0 || target >= P.V) return;
  hard.logit = load_one<S, T>(student + target * P.student.stride_v * element_size<S>(P.student), P.student.dtype);
  if constexpr (kParted) {
    hard.teacher_logit =
        load_one<U, T>(teacher + target * P.teacher.stride_v * element_size<U>(P.teacher), P.teacher.dtype);
  }
}

}  // namespace fastkd::cuda
