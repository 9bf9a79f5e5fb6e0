// The weights of adaptive_kl_div on the GPU: of each row the share of sum |p - q| that lies outside of the teacher's
// head; see math/head.h. A team of threads has a row: a block; or, of rows that lie side by side, a lane of each warp
// of a block. It reads the row for its maxima and sums, keeps as much of the teacher in shared memory as fits, and
// reads the rest again, from the L2, for each step of the search; last both sides, for the differences.
#pragma once
#include "cuda/rows_lanes.cuh"
#include "math/head.h"

namespace fastkd::cuda {

template <class T>
__device__ __forceinline__ T smaller(T x, T y) {
  return y < x ? y : x;
}
template <class T>
__device__ __forceinline__ T larger(T x, T y) {
  return y > x ? y : x;
}

// What the threads of a team find out of their classes in a step: the mass above the middle, the least logit there, and
// the largest below.
template <class T>
struct HeadSplit {
  unsigned long long mass;
  T least, largest;

  static __device__ HeadSplit empty() { return {0, kInf<T>, -kInf<T>}; }
  static __device__ HeadSplit combine(HeadSplit x) {
    return {warp_sum(x.mass), -warp_max(-x.least), warp_max(x.largest)};
  }
  __device__ void merge(const HeadSplit& x) {
    mass += x.mass;
    least = smaller(least, x.least);
    largest = larger(largest, x.largest);
  }
};

// The differences in the head and in the tail.
template <class T>
struct HeadShares {
  T head, tail;

  static __device__ HeadShares empty() { return {T(0), T(0)}; }
  static __device__ HeadShares combine(HeadShares x) { return {warp_sum(x.head), warp_sum(x.tail)}; }
  __device__ void merge(const HeadShares& x) {
    head += x.head;
    tail += x.tail;
  }
};

// Bytes of shared memory that a warp, or a thread of rows side by side, needs for what is exchanged.
template <class T>
inline constexpr int kHeadRoom = 2 * int((sizeof(SharedSums<T, false>) + 7) / 8 * 8);

// A block. What is exchanged goes to two places by turns: whoever writes to one again has passed the barrier at the
// other, which nobody reaches before it has read the first.
template <class T>
struct BlockTeam {
  const char *student, *teacher;
  T* kept;
  char* room;
  int turn = 0;

  __device__ BlockTeam(const RowsParams<T>& P) {
    student = row_of(P.student, row());
    teacher = row_of(P.teacher, row());
    room = ptx::dynamic_shared();
    kept = reinterpret_cast<T*>(room + (blockDim.x / 32 + 1) * kHeadRoom<T>);
  }
  __device__ int64_t row() const { return blockIdx.x; }
  __device__ bool exists() const { return true; }
  __device__ int64_t first() const { return threadIdx.x; }
  __device__ int64_t step() const { return blockDim.x; }
  __device__ T* at(int64_t v) const { return kept + v; }

  template <class X>
  __device__ X combine(const X& x) {
    const int warps = int(blockDim.x) / 32;
    X* place = reinterpret_cast<X*>(room + (warps + 1) * (turn ? kHeadRoom<T> / 2 : 0));
    turn ^= 1;
    return combine_over_row(x, place, 0, warps, warps);
  }
  __device__ Sums<T> combine_sums(const Sums<T>& x, const RowConstants<T>& r) {
    return combine(SharedSums<T, false>{x, r.exp2_student, r.exp2_teacher}).sums;
  }
};

// A lane of each warp of the block.
template <class T>
struct LaneTeam {
  LaneRow<AnyType, AnyType> L;
  const char *student, *teacher;
  T* kept;
  char* room;
  int turn = 0;

  __device__ LaneTeam(const RowsParams<T>& P, int64_t inner, int64_t in_run) : L(P, inner, in_run) {
    student = L.student;
    teacher = L.teacher;
    room = ptx::dynamic_shared();
    kept = reinterpret_cast<T*>(room + 32 * blockDim.y * kHeadRoom<T>);
  }
  __device__ int64_t row() const { return L.row; }
  __device__ bool exists() const { return L.exists; }
  __device__ int64_t first() const { return threadIdx.y; }
  __device__ int64_t step() const { return blockDim.y; }
  __device__ T* at(int64_t v) const { return kept + v * 32 + threadIdx.x; }

  template <class X, class Merge>
  __device__ X combine(const X& x, Merge&& merge) {
    X* place = reinterpret_cast<X*>(room + 32 * blockDim.y * (turn ? kHeadRoom<T> / 2 : 0));
    turn ^= 1;
    return over_warps(x, place, merge);
  }
  template <class X>
  __device__ X combine(const X& x) {
    return combine(x, [](X& all, const X& other) { all.merge(other); });
  }
  __device__ Sums<T> combine_sums(const Sums<T>& x, const RowConstants<T>& r) {
    return combine(x, [&](Sums<T>& all, const Sums<T>& other) { merge<T, false>(all, other, r); });
  }
};

template <class T, class Team>
__device__ __forceinline__ void weight_of_row(const RowsParams<T>& P, double* weight, int64_t kept, Team team) {
  const int64_t row = team.row(), first = team.first(), step = team.step();
  const bool counts = team.exists() && (!P.mask || P.mask[row]);
  const int64_t V = counts ? P.V : 0;  // nothing is read of a row that is masked out
  const int64_t step_student = P.student.stride_v * P.student.element_size;
  const int64_t step_teacher = P.teacher.stride_v * P.teacher.element_size;
  const RowConstants<T> r = row_constants(P, row);
  const auto load_student = [&](int64_t v) {
    return load_one<AnyType, T>(team.student + v * step_student, P.student.dtype);
  };
  const auto load_teacher = [&](int64_t v) {
    return load_one<AnyType, T>(team.teacher + v * step_teacher, P.teacher.dtype);
  };
  const auto again = [&](int64_t v) { return v < kept ? *team.at(v) : load_teacher(v); };
  // visit(t) of this thread's classes
  const auto walk_teacher = [&](int64_t classes, auto&& visit) {
    walk<T>(
        first, step, classes, [&](int64_t v, T&, T& t) { t = again(v); },
        [&](int64_t, int count, const T(&)[kAtOnce], const T(&t)[kAtOnce]) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (i < count) visit(t[i]);
          }
        });
  };

  Sums<T> own = Sums<T>::empty();
  walk<T>(
      first, step, V,
      [&](int64_t v, T& s, T& t) {
        s = load_student(v);
        t = load_teacher(v);
        if (v < kept) *team.at(v) = t;
      },
      [&](int64_t, int, const T(&s)[kAtOnce], const T(&t)[kAtOnce]) { add<T, kAtOnce, false>(own, s, t, r); });
  const Sums<T> k = team.combine_sums(own, r);
  const bool possible =
      k.sum_student > T(0) && k.sum_student < kInf<T> && k.sum_teacher > T(0) && k.sum_teacher < kInf<T>;
  const auto mass = [&](T t) { return (unsigned long long)mass_of(exp2_of((t - k.max_teacher) * r.exp2_teacher)); };

  // All classes are above the middle, so to say; the range is from the least to the largest below the best.
  HeadSplit<T> split = HeadSplit<T>::empty();
  walk_teacher(possible ? V : 0, [&](T t) {
    split.mass += mass(t);
    split.least = smaller(split.least, t);
    if (t < k.max_teacher) split.largest = larger(split.largest, t);
  });
  split = team.combine(split);
  HeadRange<T> range{split.least, split.largest};
  const double mu = P.parameter[row];
  const uint64_t limit = mass_limit(mu, split.mass);
  if (!possible || range.least > range.largest) range = {-kInf<T>, -kInf<T>};  // the best alone are there

  uint64_t beyond = 0;  // the mass above the top
  T top = kInf<T>;
  while (__any_sync(~0u, range.open())) {  // all warps of a block have the same rows
    const T middle = range.middle();
    split = HeadSplit<T>::empty();
    walk_teacher(range.open() ? V : 0, [&](T t) {
      if (t > middle) {
        split.least = smaller(split.least, t);
        if (t <= top) split.mass += mass(t);
      } else {
        split.largest = larger(split.largest, t);
      }
    });
    split = team.combine(split);
    if (!range.open()) continue;
    const uint64_t above = beyond + split.mass;
    range.narrow(above, limit, split.least, split.largest);
    if (above > limit) continue;
    beyond = above;
    top = range.largest;
  }

  const RowSoftmax<T> softmax(r, k.max_student, k.sum_student, k.max_teacher, k.sum_teacher);
  HeadShares<T> shares = HeadShares<T>::empty();
  walk<T>(
      first, step, possible ? V : 0,
      [&](int64_t v, T& s, T& t) {
        s = load_student(v);
        t = again(v);
      },
      [&](int64_t, int count, const T(&s)[kAtOnce], const T(&t)[kAtOnce]) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const T of_class = i < count ? TotalVariation<T>().loss(softmax(s[i], t[i])) : T(0);
          shares.head += t[i] > range.least ? of_class : T(0);
          shares.tail += t[i] > range.least ? T(0) : of_class;
        }
      });
  shares = team.combine(shares);
  if (first != 0 || !team.exists()) return;
  weight[row] = !possible ? 0.5 : mu == 1 ? 0.0 : share_of_tail(double(shares.head), double(shares.tail));
}

template <class T>
inline constexpr int kHeadThreads = sizeof(T) == 8 ? 256 : 512;
inline constexpr int kHeadWarps = 8;  // of rows side by side

// grid (N).
template <class T>
__global__ void __launch_bounds__(kHeadThreads<T>, 1)
    head_kernel(const __grid_constant__ RowsParams<T> P, double* weight, int64_t kept) {
  weight_of_row(P, weight, kept, BlockTeam<T>(P));
}

// grid (runs * in_run), block (32, warps).
template <class T>
__global__ void __launch_bounds__(kHeadWarps * 32, 1)
    head_lanes_kernel(const __grid_constant__ RowsParams<T> P, double* weight, int64_t kept, int64_t inner,
                      int64_t in_run) {
  weight_of_row(P, weight, kept, LaneTeam<T>(P, inner, in_run));
}

}  // namespace fastkd::cuda
