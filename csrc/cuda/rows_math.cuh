// What the kernels of the rows schedule share: a row's constants, its geometry in memory, the
// online sums over its classes, and the step from logits to loss and gradient.
#pragma once
#include "common/rows_params.h"
#include "cuda/in_packs.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "divergence_functors.h"
#include "math/two_classes.h"

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
  T hard_loss_scale;             // weight hard_weight; of a target that is parted see TargetLoss
  T hard_grad_scale;             // hard_loss_scale upstream / divisor, and / T if at T
};

template <bool kParted = false, class T>
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
  if constexpr (kParted) {
    r.loss_scale *= T(P.parameter[row]);
    r.grad_scale *= T(P.parameter[row]);
    if (P.hard.loss == TargetLoss::kDecoupled) {
      r.hard_loss_scale *= (P.t_squared ? temperature * temperature : T(1)) * T(P.second_parameter[row]);
      r.hard_grad_scale = r.hard_loss_scale * r.inv_temperature * upstream;
    }
  }
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
    const bool dense =
        kInPacks<T> && P.student.stride_v == 1 && P.teacher.stride_v == 1 && (!grad || P.grad.stride_v == 1);
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
    if (target < 0 || target >= P.V) {
      target = 0;
      scale = kInf<T> - kInf<T>;  // as loud as the host, which cannot look, may be
    }
    everywhere = scale * T(P.hard.smoothing) / T(P.V);
    of_target = scale * T(1 - P.hard.smoothing);
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
