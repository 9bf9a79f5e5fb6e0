// What the kernels of the rows schedule share: a row's constants, its geometry in memory, and the online sums over its
// classes.
#pragma once
#include "common/rows_params.h"
#include "cuda/in_packs.h"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/scalar.h"

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

}  // namespace fastkd::cuda
