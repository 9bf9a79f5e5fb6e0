// What is told of a row besides its loss: entropies of student and teacher, whether their best class is the same, and
// the cross-entropy with its target; see csrc/cpu/rows_parts.cpp. The soft loss is rows_kernel's own. A warp or a block
// has a row, which it reads for its maxima and once more for its sums.
#pragma once
#include "cuda/rows_math.cuh"

namespace fastkd::cuda {

inline constexpr int kPartsThreads = 256;
// Classes of a thread that are on their way together.
template <class T>
inline constexpr int kPartsAtOnce = sizeof(T) == 8 ? 1 : 4;

template <class T>
struct PartsMaxima {
  T student, teacher;
  static __device__ PartsMaxima empty() { return {-kInf<T>, -kInf<T>}; }
  static __device__ PartsMaxima combine(PartsMaxima x) { return {warp_max(x.student), warp_max(x.teacher)}; }
};

// Of one side: e, and e (max - z); of coins their entropies.
struct PartsOfSide {
  double sum, terms, best;  // best: less the first class that has the maximum
  static __device__ PartsOfSide empty() { return {0, 0, -kInf<double>}; }
  static __device__ PartsOfSide combine(PartsOfSide x) {
    return {warp_sum(x.sum), warp_sum(x.terms), warp_max(x.best)};
  }

  template <class T>
  __device__ __forceinline__ void add(T z, T max, T raw_max, double inv_temperature, int64_t v, bool coins) {
    if (z == raw_max && best == -kInf<double>) best = -double(v);
    if (coins) {
      const T a = (z < T(0) ? -z : z) * T(inv_temperature), e = exp2_of(-a * kLog2e<T>);
      sum = 1;
      terms += double(log_ratio(T(1) + e, T(1), e).log + (e == T(0) ? T(0) : a * e / (T(1) + e)));
      return;
    }
    const T x = z - max, e = exp2_of(x * T(inv_temperature * kLog2e<double>));
    sum += double(e);
    terms -= e == T(0) ? 0.0 : double(e * x);
  }
  __device__ double entropy(double inv_temperature, bool coins) const {
    if (coins) return terms;
    return sum == 0 ? 0.0 : log(sum) + terms * inv_temperature / sum;
  }
};
struct PartsSums {
  PartsOfSide student, teacher;
  double hard, logits;  // of the student at temperature 1, and of z - max
  static __device__ PartsSums empty() { return {PartsOfSide::empty(), PartsOfSide::empty(), 0, 0}; }
  static __device__ PartsSums combine(PartsSums x) {
    return {PartsOfSide::combine(x.student), PartsOfSide::combine(x.teacher), warp_sum(x.hard), warp_sum(x.logits)};
  }
};

template <class T>
struct PartsRoom {
  PartsMaxima<T> maxima[kPartsThreads / 32 + 1];
  PartsSums sums[kPartsThreads / 32 + 1];
};

// grid: ceil(N / rows of a block), block (threads of a row, rows).
template <class T>
__global__ void __launch_bounds__(kPartsThreads, 2) parts_kernel(const __grid_constant__ RowsParams<T> P, bool coins) {
  PartsRoom<T>& room = *reinterpret_cast<PartsRoom<T>*>(ptx::dynamic_shared());
  const int rank = threadIdx.x, threads = blockDim.x, warps = threads / 32;
  const int first_warp = threadIdx.y * warps, block_warps = warps * blockDim.y;
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = row < P.N, counts = exists && (!P.mask || P.mask[row]);
  const double inv = 1 / P.temperature[exists ? row : 0], inv_teacher = 1 / P.teacher_temperature[exists ? row : 0];
  const char* student = row_of(P.student, exists ? row : 0);
  const char* teacher = row_of(P.teacher, exists ? row : 0);
  const int64_t step_student = P.student.stride_v * P.student.element_size;
  const int64_t step_teacher = P.teacher.stride_v * P.teacher.element_size;
  const auto load = [&](int64_t v, T& s, T& t) {
    s = load_one<AnyType, T>(student + v * step_student, P.student.dtype);
    t = load_one<AnyType, T>(teacher + v * step_teacher, P.teacher.dtype);
  };
  // visit(v, s, t) of this thread's classes
  const auto each = [&](auto&& visit) {
#pragma unroll 1
    for (int64_t v = rank; counts && v < P.V; v += kPartsAtOnce<T> * threads) {
      T s[kPartsAtOnce<T>], t[kPartsAtOnce<T>];
#pragma unroll
      for (int i = 0; i < kPartsAtOnce<T>; ++i) {
        if (v + i * threads < P.V) load(v + i * threads, s[i], t[i]);
      }
#pragma unroll
      for (int i = 0; i < kPartsAtOnce<T>; ++i) {
        if (v + i * threads < P.V) visit(v + i * threads, s[i], t[i]);
      }
    }
  };
  PartsMaxima<T> own = PartsMaxima<T>::empty();
  each([&](int64_t, T s, T t) {
    own.student = s > own.student ? s : own.student;
    own.teacher = t > own.teacher ? t : own.teacher;
  });
  const PartsMaxima<T> raw = combine_over_row(own, room.maxima, first_warp, warps, block_warps);
  const T max_student = raw.student == -kInf<T> ? T(0) : raw.student;
  const T max_teacher = raw.teacher == -kInf<T> ? T(0) : raw.teacher;
  PartsSums sums = PartsSums::empty();
  each([&](int64_t v, T s, T t) {
    sums.student.add(s, max_student, raw.student, inv, v, coins);
    sums.teacher.add(t, max_teacher, raw.teacher, inv_teacher, v, coins);
    sums.hard += double(exp2_of((s - max_student) * kLog2e<T>));
    sums.logits += double(s - max_student);
  });
  sums = combine_over_row(sums, room.sums, first_warp, warps, block_warps);
  if (rank != 0 || !exists) return;
  RowParts parts{};
  if (counts) {
    const int64_t target = P.hard.target[row];
    parts.student_entropy = sums.student.entropy(inv, coins);
    parts.teacher_entropy = sums.teacher.entropy(inv_teacher, coins);
    parts.agreement = sums.student.best == sums.teacher.best;
    if (target < 0 || target >= P.V) {
      parts.hard = kInf<double> - kInf<double>;
    } else {
      const double logit = double(load_one<AnyType, T>(student + target * step_student, P.student.dtype));
      const double smoothing = P.hard.smoothing;
      parts.hard = sums.hard == 0 ? kInf<double> : log(sums.hard);
      if (smoothing < 1 && sums.hard != 0) parts.hard += (1 - smoothing) * (double(max_student) - logit);
      if (smoothing > 0 && sums.hard != 0) parts.hard -= smoothing * sums.logits / double(P.V);
    }
  }
  P.parts[row] = parts;
}

}  // namespace fastkd::cuda
