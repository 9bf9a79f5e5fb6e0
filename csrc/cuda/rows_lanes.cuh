// The rows schedule where rows lie side by side, as the pixels of maps [B, C, H, W] do whose classes are C: a lane of a
// warp has a row, so that 32 neighbours are read together, and several warps share the classes of 32 rows.
//
// A block reads its rows once, class by class, and keeps as many classes as fit in shared memory, as they lie in global
// memory; a thread reads back what it has stored itself. The others it reads again, from the L2. The passes are those
// of rows_kernel. Traffic: student + teacher + gradient, once each where all classes fit.
#pragma once
#include "cuda/rows_kernel.cuh"

namespace fastkd::cuda {

inline constexpr int kLanesWarps = 16;  // of a block, at most
inline constexpr int kAtOnce = 4;       // classes of a thread that are on their way together

// Where the row of this thread lies, and which of its classes the thread has: warp, warp + warps, ...
template <class S, class U>
struct LaneRow {
  int64_t row;
  bool exists;
  const char *student, *teacher;
  char* grad;
  int64_t step_student, step_teacher, step_grad;  // bytes from class to class

  // in_run: blocks that share a run of `inner` rows that lie side by side
  template <class T>
  __device__ LaneRow(const RowsParams<T>& P, int64_t inner, int64_t in_run) {
    const int64_t at = int64_t(blockIdx.x) % in_run * 32 + threadIdx.x;
    exists = at < inner;
    row = int64_t(blockIdx.x) / in_run * inner + (exists ? at : 0);
    student = row_of(P.student, row);
    teacher = row_of(P.teacher, row);
    grad = row_of(P.grad, row);
    step_student = P.student.stride_v * element_size<S>(P.student);
    step_teacher = P.teacher.stride_v * element_size<U>(P.teacher);
    step_grad = P.grad.stride_v * element_size<S>(P.grad);
  }
};

// The classes that a block keeps: [kept, 32] of student and teacher each, in the types they have in memory.
template <class S, class U>
struct KeptClasses {
  char *student, *teacher;
  int64_t kept;

  // The logits of a class of this thread's row, from global memory; they stay here where there is room.
  template <class T>
  __device__ __forceinline__ void take(const LaneRow<S, U>& L, const RowsParams<T>& P, int64_t v, T& s, T& t) const {
    take_side<S>(L.student + v * L.step_student, P.student.dtype, v, student, s);
    take_side<U>(L.teacher + v * L.step_teacher, P.teacher.dtype, v, teacher, t);
  }
  // The same once more.
  template <class T>
  __device__ __forceinline__ void again(const LaneRow<S, U>& L, const RowsParams<T>& P, int64_t v, T& s, T& t) const {
    again_side<S>(L.student + v * L.step_student, P.student.dtype, v, student, s);
    again_side<U>(L.teacher + v * L.step_teacher, P.teacher.dtype, v, teacher, t);
  }

 private:
  template <class Of, class T>
  __device__ __forceinline__ void take_side(const char* p, DType type, int64_t v, char* room, T& x) const {
    with_type<Of, T>(type, [&](auto storage) {
      using From = decltype(storage);
      const From value = *reinterpret_cast<const From*>(p);
      if (v < kept) reinterpret_cast<From*>(room)[v * 32 + threadIdx.x] = value;
      x = widen<T>(value);
    });
  }
  template <class Of, class T>
  __device__ __forceinline__ void again_side(const char* p, DType type, int64_t v, const char* room, T& x) const {
    with_type<Of, T>(type, [&](auto storage) {
      using From = decltype(storage);
      const From* at =
          v < kept ? reinterpret_cast<const From*>(room) + v * 32 + threadIdx.x : reinterpret_cast<const From*>(p);
      x = widen<T>(*at);
    });
  }
};

// visit(v, count, s, t) for the classes first, first + step, ..., kAtOnce of them at a time, from v on; count of them
// are there, and the others have p = q = 0.
template <class T, class Load, class Visit>
__device__ __forceinline__ void walk(int64_t first, int64_t step, int64_t V, Load&& load, Visit&& visit) {
  T s[kAtOnce], t[kAtOnce];
  for (int64_t v = first; v < V; v += kAtOnce * step) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      s[i] = t[i] = -kInf<T>;
      if (v + i * step < V) {
        load(v + i * step, s[i], t[i]);
        ++count;
      }
    }
    visit(v, count, s, t);
  }
}
// For the classes of a thread of this schedule.
template <class T, class Load, class Visit>
__device__ __forceinline__ void walk(int64_t V, Load&& load, Visit&& visit) {
  walk<T>(int64_t(threadIdx.y), int64_t(blockDim.y), V, load, visit);
}

// What the warps of a block have summed for each row, as one, in their order. room: [warps, 32].
template <class X, class Merge>
__device__ __forceinline__ X over_warps(const X& own, X* room, Merge&& merge) {
  room[threadIdx.y * 32 + threadIdx.x] = own;
  __syncthreads();
  X all = room[threadIdx.x];
  for (int w = 1; w < int(blockDim.y); ++w) merge(all, room[w * 32 + threadIdx.x]);
  return all;
}

template <class T, bool kEntropy>
__device__ __forceinline__ void merge(Sums<T>& k, Sums<T> other, const RowConstants<T>& r) {
  const T max_student = other.max_student > k.max_student ? other.max_student : k.max_student;
  const T max_teacher = other.max_teacher > k.max_teacher ? other.max_teacher : k.max_teacher;
  const auto raise = [&](Sums<T>& x) {
    const T up = max_teacher - x.max_teacher, before = x.sum_teacher;
    moved(x.max_student, x.sum_student, max_student, r.exp2_student);
    const T factor = moved(x.max_teacher, x.sum_teacher, max_teacher, r.exp2_teacher);
    if constexpr (kEntropy) x.entropy = before == T(0) ? T(0) : factor * (x.entropy + before * up);
  };
  raise(k);
  raise(other);
  k.sum_student += other.sum_student;
  k.sum_teacher += other.sum_teacher;
  k.entropy += other.entropy;
}

// The gradient of a row whose divergence has none: that of its hard loss, if it has one.
template <bool kParted, class T, class S, class U>
__device__ void hard_grad(const RowsParams<T>& P, const LaneRow<S, U>& L, const HardRow<T>& hard) {
  for (int64_t v = threadIdx.y; v < P.V; v += blockDim.y) {
    T grad[1] = {};
    if (hard.target >= 0) {
      const T s[1] = {load_one<S, T>(L.student + v * L.step_student, P.student.dtype)};
      hard.template add<kParted>(s, v, 1, grad);
    }
    store_one<S>(L.grad + v * L.step_grad, P.grad.dtype, grad[0]);
  }
}

// grid (runs * in_run), block (32, warps). Shared memory: what the warps exchange, and the classes that are kept.
template <class T, class S, class U, class D>
__global__ void __launch_bounds__(kLanesWarps * 32, 1)
    rows_lanes_kernel(const __grid_constant__ RowsParams<T> P, int64_t inner, int64_t in_run, int64_t kept) {
  Sums<T>* const room = reinterpret_cast<Sums<T>*>(ptx::dynamic_shared());
  LossSums<T>* const room_of_losses = reinterpret_cast<LossSums<T>*>(room + 32 * blockDim.y);
  HardSums<T>* const room_of_hard = reinterpret_cast<HardSums<T>*>(room_of_losses + 32 * blockDim.y);
  char* const memory = reinterpret_cast<char*>(room_of_hard + (P.hard.target ? 32 * blockDim.y : 0));
  const KeptClasses<S, U> K{memory, memory + kept * 32 * element_size<S>(P.student), kept};
  const LaneRow<S, U> L(P, inner, in_run);
  const bool counts = L.exists && (!P.mask || P.mask[L.row]);
  const int64_t V = counts ? P.V : 0;  // nothing is read of a row that is masked out
  constexpr bool kParted = kWithoutTarget<D>;
  const RowConstants<T> r = row_constants<kParted>(P, L.row);
  const int64_t parted = parted_target<kParted>(P, L.row);
  const auto without = [&](int64_t v, T& s, T& t) {
    if (kParted && v == parted) s = t = -kInf<T>;
  };

  Sums<T> own = Sums<T>::empty();
  HardSums<T> hard_sums = HardSums<T>::empty();
  if (counts && P.hard.target && threadIdx.y == 0) {
    read_target<kParted, S, U>(P, L.row, L.student, L.teacher, hard_sums);
  }
  walk<T>(
      V,
      [&](int64_t v, T& s, T& t) {
        K.take(L, P, v, s, t);
        without(v, s, t);
      },
      [&](int64_t, int count, const T(&s)[kAtOnce], const T(&t)[kAtOnce]) {
        add<T, kAtOnce, D::kTeacherEntropy, kParted>(own, hard_sums, s, t, r, P.hard, count);
      });
  const Sums<T> whole =
      over_warps(own, room, [&](Sums<T>& all, const Sums<T>& other) { merge<T, D::kTeacherEntropy>(all, other, r); });
  const Sums<T> k = sums_of_softmax<D>(whole, counts);
  HardRow<T> hard;
  if (P.hard.target) {
    hard_sums = rebased<kParted>(hard_sums, own, k);
    hard_sums = over_warps(hard_sums, room_of_hard, [](HardSums<T>& all, const HardSums<T>& other) { all.add(other); });
    hard_sums = completed<kParted>(hard_sums, whole, r);
    if (counts) {
      hard = hard_row<kParted>(P, L.row, r, k, hard_sums);
      if (threadIdx.y == 0) save_hard<kParted>(P, L.row, r, k, hard_sums);
    }
  }

  const bool possible = counts && k.sum_student != T(0) && k.sum_teacher != T(0) && !P.hard.without_soft();
  const bool write = L.exists && L.grad;
  const RowSoftmax<T> softmax(r, k.max_student, k.sum_student, k.max_teacher, k.sum_teacher);
  const double parameter = P.parameter[L.row], second = P.second_parameter[L.row];
  const auto again = [&](int64_t v, T& s, T& t) {
    K.again(L, P, v, s, t);
    without(v, s, t);
  };
  const auto store = [&](int64_t v, int count, const T(&grad)[kAtOnce]) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i < count) store_one<S>(L.grad + (v + i * int(blockDim.y)) * L.step_grad, P.grad.dtype, grad[i]);
    }
  };
  LossSums<T> sums = LossSums<T>::empty();
  with_functor<D>(parameter, second, [&](const auto& divergence) {
    walk<T>(possible ? V : 0, again, [&](int64_t v, int count, const T(&s)[kAtOnce], const T(&t)[kAtOnce]) {
      T grad[kAtOnce];
      reduce(s, t, softmax, divergence, r.grad_scale, &hard, v, blockDim.y, sums, grad);
      if (D::kCentred && write) store(v, count, grad);
    });
  });
  sums = of_row<T, D>(
      over_warps(sums, room_of_losses, [](LossSums<T>& all, const LossSums<T>& other) { all.add(other); }));
  const T grad_scale = kTwoSums<D> ? r.grad_scale * sums.second : r.grad_scale;
  if (L.exists && threadIdx.y == 0) {
    if (counts) {
      save<T, D>(P, L.row, k, sums, r);
    } else {
      save_nothing(P, L.row);
    }
  }
  if (write && (!possible || (!D::kCentred && no_gradient(k.sum_student, k.sum_teacher, sums.slope)))) {
    hard_grad<kParted>(P, L, hard);
  } else if (write && !D::kCentred) {
    with_functor<D>(parameter, second, [&](const auto& divergence) {
      walk<T>(V, again, [&](int64_t v, int count, const T(&s)[kAtOnce], const T(&t)[kAtOnce]) {
        T grad[kAtOnce];
        gradient(s, t, softmax, divergence, grad_scale, sums.slope, &hard, v, blockDim.y, grad);
        store(v, count, grad);
      });
    });
  }
}

// The gradient from the statistics that forward saved. grid and block as above.
template <class T, class S, class U, class D>
__global__ void __launch_bounds__(kLanesWarps * 32, 1)
    rows_lanes_gradient_kernel(const __grid_constant__ RowsParams<T> P, int64_t inner, int64_t in_run) {
  const LaneRow<S, U> L(P, inner, in_run);
  if (!L.exists) return;
  RowsStats k{};
  HardRow<T> hard;
  constexpr bool kParted = kWithoutTarget<D>;
  const RowConstants<T> r = row_constants<kParted>(P, L.row);
  const int64_t parted = parted_target<kParted>(P, L.row);
  if (!P.mask || P.mask[L.row]) {
    k = P.stats[L.row];
    if (P.hard.target) hard = hard_row<kParted>(P, L.row, r, k);
  }
  const auto store = [&](int64_t v, T grad) { store_one<S>(L.grad + v * L.step_grad, P.grad.dtype, grad); };
  if (no_gradient(T(k.sum_student), T(k.sum_teacher), T(k.slope)) || P.hard.without_soft()) {
    return hard_grad<kParted>(P, L, hard);
  }
  const RowSoftmax<T> softmax(r, T(k.max_student), T(k.sum_student), T(k.max_teacher), T(k.sum_teacher));
  const auto load = [&](int64_t v, T& s, T& t) {
    s = load_one<S, T>(L.student + v * L.step_student, P.student.dtype);
    t = load_one<U, T>(L.teacher + v * L.step_teacher, P.teacher.dtype);
    if (kParted && v == parted) s = t = -kInf<T>;
  };
  const T grad_scale = kTwoSums<D> ? r.grad_scale * T(k.factor) : r.grad_scale;
  with_functor<D>(P.parameter[L.row], P.second_parameter[L.row], [&](const auto& divergence) {
    walk<T>(P.V, load, [&](int64_t v, int count, const T(&s)[kAtOnce], const T(&t)[kAtOnce]) {
      T grad[kAtOnce];
      gradient(s, t, softmax, divergence, grad_scale, T(k.slope), &hard, v, blockDim.y, grad);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < count) store(v + i * int(blockDim.y), grad[i]);
      }
    });
  });
}

}  // namespace fastkd::cuda
