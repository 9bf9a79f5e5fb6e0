// What the kernels of the rows schedule share: a row's constants, its geometry in memory, the
// online sums over its classes, and the step from logits to loss and gradient.
#pragma once
#include "common/rows_params.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "divergence_functors.h"

namespace fastkd::cuda {

using namespace fastkd::FASTKD_ISA;

__device__ __forceinline__ float exp2_of(float x) { return ptx::exp2_approx(x); }
// a call: inlined eight times it would take more registers than there are
FASTKD_NOINLINE __device__ inline double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ float log_of(float x) { return logf(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }

// Below every logit: the maximum of nothing. Finite, so that x - kNone is no NaN for x = -inf.
template <class T>
inline constexpr T kNone = sizeof(T) == 8 ? T(-1.7976931348623157e308) : T(-3.40282346e38f);

template <class T>
struct RowConstants {
  T inv_temperature, inv_teacher_temperature;
  T exp2_student, exp2_teacher;  // log2(e) / T
  T b;                           // 1 / T - 1 / T_teacher
  T loss_scale;                  // T^2 weight soft_weight
  T grad_scale;                  // T^2 weight soft_weight upstream / divisor / T
  T hard_loss_scale;             // weight hard_weight
  T hard_grad_scale;             // weight hard_weight upstream / divisor
};

template <class T>
__device__ RowConstants<T> row_constants(const RowsParams<T>& P, int64_t row) {
  RowConstants<T> r;
  const T temperature = T(P.temperature[row]), teacher_temperature = T(P.teacher_temperature[row]);
  r.inv_temperature = T(1) / temperature;
  r.inv_teacher_temperature = T(1) / teacher_temperature;
  r.exp2_student = kLog2e<T> * r.inv_temperature;
  r.exp2_teacher = kLog2e<T> * r.inv_teacher_temperature;
  r.b = temperature == teacher_temperature ? T(0) : r.inv_temperature - r.inv_teacher_temperature;
  const T weight = P.weight ? P.weight[row] : T(1);
  const T upstream = T(P.scale ? *P.scale : P.grad_scale) * (P.upstream ? P.upstream[row * P.upstream_stride] : T(1));
  r.loss_scale = (P.t_squared ? temperature * temperature : T(1)) * weight * T(P.hard.soft_weight);
  r.grad_scale = r.loss_scale * r.inv_temperature * upstream;
  r.hard_loss_scale = weight * T(P.hard.hard_weight);
  r.hard_grad_scale = r.hard_loss_scale * upstream;
  return r;
}

// Emitted once, not in every kernel three times: a division of 64 bits for each leading dimension.
FASTKD_NOINLINE __device__ inline char* row_of(const RowsTensor& x, int64_t row) {
  return x.data ? x.row(row) : nullptr;
}

// Where a row lies, and how it falls into packs that are 16-byte aligned on every side, and the
// edges before and after them. Rows that cannot be aligned together are edges from end to end.
template <class S, class U>
struct RowLayout {
  const char *student, *teacher;
  char* grad;
  int64_t head, packs, edges;

  template <class T>
  __device__ RowLayout(const RowsParams<T>& P, int64_t row)
      : student(row_of(P.student, row)), teacher(row_of(P.teacher, row)), grad(row_of(P.grad, row)) {
    head = P.V;
    const bool dense = P.student.stride_v == 1 && P.teacher.stride_v == 1 && (!grad || P.grad.stride_v == 1);
#pragma unroll 1
    for (int h = 0; dense && h < kPack && h < P.V; ++h) {
      const auto aligned = [h](const char* p, int size) {
        return (reinterpret_cast<uintptr_t>(p) + h * size) % 16 == 0;
      };
      if (aligned(student, element_size<S>(P.student)) && aligned(teacher, element_size<U>(P.teacher)) &&
          (!grad || aligned(grad, element_size<S>(P.grad)))) {
        head = h;
        break;
      }
    }
    packs = (P.V - head) / kPack;
    edges = P.V - packs * kPack;
  }
  __device__ int64_t pack(int64_t i) const { return head + i * kPack; }                  // its first class
  __device__ int64_t edge(int64_t i) const { return i < head ? i : i + packs * kPack; }  // its class
};

// Maxima and sums over classes seen so far, or over those of several threads.
template <class T>
struct Sums {
  T max_student, sum_student, max_teacher, sum_teacher;
  T entropy;  // sum e^((t - max) / T_teacher) (max - t)

  static __device__ Sums empty() { return {kNone<T>, T(0), kNone<T>, T(0), T(0)}; }
};

// Moves one side's maximum up: what was summed counts less.
template <class T>
__device__ __forceinline__ T moved(T& max, T& sum, T higher, T exp2_scale) {
  const T factor = exp2_of((max - higher) * exp2_scale);
  max = higher;
  sum *= factor;
  return factor;
}

template <class T, int kCount, bool kEntropy>
__device__ __forceinline__ void add(Sums<T>& sums, const T (&s)[kCount], const T (&t)[kCount],
                                    const RowConstants<T>& r) {
  T max_student = s[0], max_teacher = t[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    max_student = s[i] > max_student ? s[i] : max_student;
    max_teacher = t[i] > max_teacher ? t[i] : max_teacher;
  }
  if (max_student > sums.max_student) moved(sums.max_student, sums.sum_student, max_student, r.exp2_student);
  if (max_teacher > sums.max_teacher) {
    const T up = max_teacher - sums.max_teacher, before = sums.sum_teacher;
    const T factor = moved(sums.max_teacher, sums.sum_teacher, max_teacher, r.exp2_teacher);
    if constexpr (kEntropy) sums.entropy = before == T(0) ? T(0) : factor * (sums.entropy + before * up);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sums.sum_student += exp2_of((s[i] - sums.max_student) * r.exp2_student);
    const T e = exp2_of((t[i] - sums.max_teacher) * r.exp2_teacher);
    sums.sum_teacher += e;
    if constexpr (kEntropy) sums.entropy += e == T(0) ? T(0) : e * (sums.max_teacher - t[i]);
  }
}

// What the cross-entropy with a row's target adds up, beside its Sums.
template <class T>
struct HardSums {
  T sum;            // e^(z - max) of the student, with the maximum of the Sums
  T logits, count;  // z - max, where labels are smoothed, of so many classes
  T logit;          // the target's z, of the one thread that reads it

  static __device__ HardSums empty() { return {T(0), T(0), T(0), T(0)}; }
  static __device__ HardSums combine(HardSums x) {
    return {warp_sum(x.sum), warp_sum(x.logits), warp_sum(x.count), warp_sum(x.logit)};
  }
  __device__ __forceinline__ void move(T max, T higher) {
    if (count > T(0)) logits += count * (max - higher);
  }
};

// The same classes, for both; count of them are there, and the others are -inf.
template <class T, int kCount, bool kEntropy>
__device__ __forceinline__ void add(Sums<T>& sums, HardSums<T>& hard, const T (&s)[kCount], const T (&t)[kCount],
                                    const RowConstants<T>& r, const HardTargets& targets, int count = kCount) {
  const T before = sums.max_student;
  add<T, kCount, kEntropy>(sums, s, t, r);
  if (!targets.target) return;
  if (r.inv_temperature != T(1)) {  // else the sum is the student's own
    if (sums.max_student > before) hard.sum *= exp2_of((before - sums.max_student) * kLog2e<T>);
#pragma unroll
    for (int i = 0; i < kCount; ++i) hard.sum += exp2_of((s[i] - sums.max_student) * kLog2e<T>);
  }
  if (targets.smoothing != 0) {
    hard.move(before, sums.max_student);
    hard.count += T(count);
#pragma unroll
    for (int i = 0; i < kCount; ++i) hard.logits += i < count ? s[i] - sums.max_student : T(0);
  }
}

// Of a thread or a part of a row, with the maximum of the whole row.
template <class T>
__device__ __forceinline__ HardSums<T> rebased(HardSums<T> hard, T max, T max_row) {
  hard.sum *= exp2_of((max - max_row) * kLog2e<T>);
  hard.move(max, max_row);
  return hard;
}

// From a logit to what the hard loss adds to its gradient, of a row whose sums are known.
template <class T>
struct HardRow {
  T max, log2_sum;
  T scale, everywhere, of_target;
  int64_t target;  // -1: the row has no hard loss

  __device__ HardRow() : max(0), log2_sum(0), scale(0), everywhere(0), of_target(0), target(-1) {}
  __device__ HardRow(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r, T max, T sum)
      : max(max), target(P.hard.target[row]) {
    log2_sum = sum == T(0) ? T(0) : log_of(sum) * kLog2e<T>;
    // of -inf alone: no finite step makes a class possible
    scale = sum == T(0) ? T(0) : r.hard_grad_scale;
    if (target < 0 || target >= P.V) {
      target = 0;
      scale = kInf<T> - kInf<T>;  // as loud as the host, which cannot look, may be
    }
    everywhere = scale * T(P.hard.smoothing) / T(P.V);
    of_target = scale * T(1 - P.hard.smoothing);
  }
  // Classes v, v + step, ...
  template <int kCount>
  __device__ __forceinline__ void add(const T (&s)[kCount], int64_t v, int64_t step, T (&grad)[kCount]) const {
    if (target < 0) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      grad[i] += exp2_of((s[i] - max) * kLog2e<T> - log2_sum) * scale - everywhere;
      if (v + i * step == target) grad[i] -= of_target;
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

// The target's logit, for one thread of a row. Before the gradient is written, perhaps over the student.
template <class S, class T>
__device__ T target_logit(const RowsParams<T>& P, int64_t row, const char* student) {
  const int64_t target = P.hard.target[row];
  if (target < 0 || target >= P.V) return T(0);
  return load_one<S, T>(student + target * P.student.stride_v * element_size<S>(P.student), P.student.dtype);
}

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

  static __device__ LossSums empty() { return {T(0), T(0)}; }
  static __device__ LossSums combine(LossSums x) { return {warp_sum(x.loss), warp_sum(x.slope)}; }
};

// From logits to p, q and w of a row whose sums are known.
template <class T>
struct RowSoftmax {
  T max_student, max_teacher, log2_student, log2_teacher;
  T exp2_student, exp2_teacher;
  T centre_student, centre_teacher, a, b, offset;

  __device__ RowSoftmax(const RowConstants<T>& r, T max_student, T sum_student, T max_teacher, T sum_teacher)
      : max_student(max_student),
        max_teacher(max_teacher),
        exp2_student(r.exp2_student),
        exp2_teacher(r.exp2_teacher),
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
  __device__ __forceinline__ Element<T> operator()(T s, T t) const {
    Element<T> e;
    e.p = exp2_of((s - max_student) * exp2_student - log2_student);
    e.q = exp2_of((t - max_teacher) * exp2_teacher - log2_teacher);
    const T x = s - centre_student, y = t - centre_teacher;
    const T lowest = T(-1e30);  // a teacher's -inf must not meet b = 0 or a b > 0
    e.w = (x - y) * a + ((y > lowest ? y : lowest) * b - offset);
    return e;
  }
};

}  // namespace fastkd::cuda
