// The rows schedule on the GPU: a divergence per row of student and teacher logits [N, V], and its
// gradient; the formulas are those of csrc/cpu/rows_kernel.cpp.
//
// rows_kernel keeps a row on chip. A group of threads shares it: a warp or more of a block, or a
// cluster of up to 8 blocks, each with its part of the row in its shared memory. Copies into it
// are asynchronous and all in flight at once; then three passes read shared memory alone: online
// maxima and sums; loss (and gradient, where the slopes add up to 0); else the gradient.
// Traffic: student + teacher + gradient, once each.
//
// Where a row does not fit, or few rows would leave the GPU idle (before clusters), the passes are
// kernels of their own, several blocks a row, over as many rows at a time as the L2 holds: the
// second kernel finds there what the first has read. Traffic as above, and L2.
//
// Sums are exchanged through shared or global memory and combined in one order: the same bits, run
// after run. Saved for backward: the gradient; or RowsStats, from which rows_gradient_kernel
// recomputes in one pass.
#pragma once
#include "cuda/rows_math.cuh"

namespace fastkd::cuda {

inline constexpr int kMaxThreads = 256;

// Divergences whose loops need so few registers that three blocks share a multiprocessor.
template <class D>
inline constexpr bool kSmall = D::kCentred && !kWithoutTarget<D> && given<D>() == Given::kProbabilities;

// ---- one class, or one pack of them

template <class S, class U, Memory kMemory, class T>
__device__ __forceinline__ void load(const char* student, const char* teacher, const RowsParams<T>& P, T (&s)[kPack],
                                     T (&t)[kPack]) {
  load_pack<S, kMemory>(student, P.student.dtype, s);
  load_pack<U, kMemory>(teacher, P.teacher.dtype, t);
}

template <class S, class U, class T>
__device__ __forceinline__ void load_class(const RowLayout<S, U>& L, const RowsParams<T>& P, int64_t v, T (&s)[1],
                                           T (&t)[1]) {
  s[0] = load_one<S, T>(L.student + v * P.student.stride_v * element_size<S>(P.student), P.student.dtype);
  t[0] = load_one<U, T>(L.teacher + v * P.teacher.stride_v * element_size<U>(P.teacher), P.teacher.dtype);
}
template <class S, class U, class T>
__device__ __forceinline__ void store_class(const RowLayout<S, U>& L, const RowsParams<T>& P, int64_t v, T grad) {
  store_one<S>(L.grad + v * P.grad.stride_v * element_size<S>(P.grad), P.grad.dtype, grad);
}

// The second pass over the classes v, v + step, ...: adds to the sums, and leaves the gradient where it is final.
template <class T, class D, int kCount>
__device__ __forceinline__ void reduce(const T (&s)[kCount], const T (&t)[kCount], const RowSoftmax<T>& softmax,
                                       const D& divergence, T grad_scale, const HardRow<T>* hard, int64_t v,
                                       int64_t step, LossSums<T>& sums, T (&grad)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Element<T> e = softmax.template of<given<D>(), kWithoutTarget<D>>(s[i], t[i]);
    const T slope = divergence.slope(e);
    sums.loss += divergence.loss(e);
    if constexpr (kTwoSums<D>) sums.second += divergence.second(e);
    if constexpr (D::kCentred) {
      grad[i] = slope * grad_scale;
    } else {
      sums.slope += slope;
    }
  }
  if (D::kCentred && hard) hard->template add<kWithoutTarget<D>>(s, v, step, grad);
}

// The gradient once the sum of the slopes is known.
template <class T, class D, int kCount>
__device__ __forceinline__ void gradient(const T (&s)[kCount], const T (&t)[kCount], const RowSoftmax<T>& softmax,
                                         const D& divergence, T grad_scale, T slopes, const HardRow<T>* hard, int64_t v,
                                         int64_t step, T (&grad)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Element<T> e = softmax.template of<given<D>(), kWithoutTarget<D>>(s[i], t[i]);
    const T slope = divergence.slope(e);
    const T p = given<D>() == Given::kLogs ? exp2_of(e.p * kLog2e<T>) : e.p;
    grad[i] = (D::kCentred ? slope : slope - p * slopes) * grad_scale;
  }
  if (hard) hard->template add<kWithoutTarget<D>>(s, v, step, grad);
}

// A row without a gradient: a side without a possible class, or slopes without a finite sum.
template <class T>
__device__ __forceinline__ bool no_gradient(T sum_student, T sum_teacher, T slopes) {
  return sum_student == T(0) || sum_teacher == T(0) || slopes == kInf<T>;
}

// scale: what the loss is multiplied by.
template <class T, class D>
__device__ __forceinline__ T soft_loss(const Sums<T>& k, const LossSums<T>& sums, const RowConstants<T>& r, T scale,
                                       const HardTargets& targets) {
  if (kWithoutTarget<D> && scale == T(0)) return T(0);
  if (k.sum_teacher == T(0)) return T(0);
  if (k.sum_student == T(0)) return kInf<T> * scale;
  T loss = sums.loss;
  if (D::kTeacherEntropy && !(kWithoutTarget<D> && targets.loss == TargetLoss::kDecoupled)) {
    loss += k.entropy * r.inv_teacher_temperature / k.sum_teacher + log_of(k.sum_teacher);
  }
  return loss * scale;
}

// Leaves the loss, and what backward needs, of a row that counts; where it has a target, after save_hard.
template <class T, class D>
__device__ __forceinline__ void save(const RowsParams<T>& P, int64_t row, const Sums<T>& k, const LossSums<T>& sums,
                                     const RowConstants<T>& r) {
  const T loss = P.hard.without_soft()
                     ? T(0)
                     : soft_loss<T, D>(k, sums, r, r.loss_scale, P.hard);  // leaves out what may be infinite
  if (!kWithoutTarget<D> && P.parts) {
    const T temperature = T(P.temperature[row]), squared = P.t_squared ? temperature * temperature : T(1);
    P.parts[row].soft = double(soft_loss<T, D>(k, sums, r, squared, P.hard));
  }
  P.loss[row] = P.hard.target ? P.loss[row] + loss : loss;
  if (!P.stats) return;
  RowsStats& stats = P.stats[row];
  stats.max_student = k.max_student;
  stats.sum_student = k.sum_student;
  stats.max_teacher = k.max_teacher;
  stats.sum_teacher = k.sum_teacher;
  stats.slope = sums.slope;
  if constexpr (kTwoSums<D>) stats.factor = sums.second;
}
// The hard part of both, by the same thread. Early, so that no register has to keep it.
template <bool kParted, class T>
__device__ __forceinline__ void save_hard(const RowsParams<T>& P, int64_t row, const RowConstants<T>& r,
                                          const Sums<T>& k, const HardSums<T>& hard) {
  if (P.stats) P.stats[row].sum_hard = hard.sum;
  if constexpr (!kParted) {
    P.loss[row] = hard_loss(P, row, r, hard, k.max_student);
  } else {
    const int64_t target = P.hard.target[row];
    const TargetPart<T> part = target_part(P, r, k, hard);
    const T loss = r.hard_loss_scale == T(0) ? T(0) : part.loss * r.hard_loss_scale;
    P.loss[row] = target < 0 || target >= P.V ? kInf<T> - kInf<T> : loss;
    if (P.stats) P.stats[row].factor = part.factor;
  }
}
// The same of a row that is masked out.
template <class T>
__device__ __forceinline__ void save_nothing(const RowsParams<T>& P, int64_t row) {
  P.loss[row] = T(0);
  if (P.stats) P.stats[row] = {};
}

// The gradient of a row whose divergence has none: that of its hard loss, if it has one. Of the packs pack, pack +
// threads, ... before end, and the edges edge, edge + edge_step, ...
template <bool kParted, class S, class U, class T>
__device__ void hard_grad(const RowsParams<T>& P, const RowLayout<S, U>& L, int64_t pack, int64_t end, int threads,
                          int64_t edge, int64_t edge_step, const HardRow<T>* hard) {
  for (int64_t i = pack; kInPacks<T> && i < end; i += threads) {
    T grad[kPack] = {}, s[kPack];
    if (hard && hard->target >= 0) {
      load_pack<S, Memory::kGlobal>(L.student + L.pack(i) * element_size<S>(P.student), P.student.dtype, s);
      hard->template add<kParted>(s, L.pack(i), 1, grad);
    }
    store_pack<S>(L.grad + L.pack(i) * element_size<S>(P.grad), P.grad.dtype, grad);
  }
  for (int64_t i = edge; i < L.edges; i += edge_step) {
    T grad[1] = {}, s[1], t[1];
    if (hard && hard->target >= 0) {
      load_class(L, P, L.edge(i), s, t);
      hard->template add<kParted>(s, L.edge(i), 1, grad);
    }
    store_class(L, P, L.edge(i), grad[0]);
  }
}

// ---- a row on chip

// Shared memory of rows_kernel.
template <class T, bool kEntropy>
struct RowsRoom {
  SharedSums<T, kEntropy> sums[kMaxThreads / 32 + 1];
  LossSums<T> losses[kMaxThreads / 32 + 1];
  HardSums<T> hard[kMaxThreads / 32 + 1];
  HardRow<T> hard_rows[kMaxThreads / 32];  // of each warp's row: not in registers, of which the loops want all
};

// grid (ceil(N / rows of a block) * blocks of a cluster), block (threads of a row, rows).
// packs: of a row that this block keeps.
template <class T, class S, class U, class D>
__global__ void __launch_bounds__(kMaxThreads, std::is_same_v<S, AnyType> ? 1
                                               : kSmall<D>                ? 3
                                                                          : 2)
    rows_kernel(const __grid_constant__ RowsParams<T> P, int packs) {
  using Shared = SharedSums<T, D::kTeacherEntropy>;
  using Room = RowsRoom<T, D::kTeacherEntropy>;
  constexpr bool kParted = kWithoutTarget<D>;
  const int rank = threadIdx.x, threads = blockDim.x;
  const int warps = threads / 32, first_warp = threadIdx.y * warps, block_warps = warps * blockDim.y;
  const unsigned part = ptx::cluster_rank();
  const int64_t row = int64_t(blockIdx.x / ptx::cluster_size()) * blockDim.y + threadIdx.y;
  Room& room = *reinterpret_cast<Room*>(ptx::dynamic_shared());
  const int size_student = element_size<S>(P.student), size_teacher = element_size<U>(P.teacher);
  char* student = ptx::dynamic_shared() + (sizeof(Room) + 15) / 16 * 16 +
                  int64_t(threadIdx.y) * packs * kPack * (size_student + size_teacher);
  char* teacher = student + int64_t(packs) * kPack * size_student;

  const bool exists = row < P.N, counts = exists && (!P.mask || P.mask[row]);
  const RowLayout<S, U> L(P, exists ? row : 0);
  const int64_t first = part * int64_t(packs), rest = L.packs - first;
  const int mine = !exists || rest < 0 ? 0 : rest < packs ? int(rest) : packs;
  const bool edges = exists && part == 0;

  // Each thread reads back only what it has copied itself: no barrier.
  for (int i = rank; counts && i < mine; i += threads) {
    const int64_t v = L.pack(first + i);
    for (int word = 0; word < kPack * size_student / 16; ++word) {
      ptx::copy_async_16(student + i * kPack * size_student + word * 16, L.student + v * size_student + word * 16);
    }
    for (int word = 0; word < kPack * size_teacher / 16; ++word) {
      ptx::copy_async_16(teacher + i * kPack * size_teacher + word * 16, L.teacher + v * size_teacher + word * 16);
    }
  }
  const RowConstants<T> r = row_constants<kParted>(P, exists ? row : 0);
  const int64_t parted = parted_target<kParted>(P, exists ? row : 0);
  Shared own{Sums<T>::empty(), r.exp2_student, r.exp2_teacher};
  HardSums<T> hard_sums = HardSums<T>::empty();
  T s[kPack], t[kPack], s1[1], t1[1], grad[kPack], grad1[1];
  for (int64_t i = rank; counts && edges && i < L.edges; i += threads) {
    load_class(L, P, L.edge(i), s1, t1);
    leave_out<kParted>(parted, L.edge(i), 1, s1, t1);
    add<T, 1, D::kTeacherEntropy, kParted>(own.sums, hard_sums, s1, t1, r, P.hard);
  }
  ptx::copy_async_wait();
  if constexpr (kParted) {  // by the thread that has copied it
    const int64_t at = parted - L.pack(first), i = at / kPack;
    if (counts && at >= 0 && i < mine && i % threads == rank) {
      store_one<S>(student + at * size_student, P.student.dtype, -kInf<T>);
      store_one<U>(teacher + at * size_teacher, P.teacher.dtype, -kInf<T>);
    }
  }
  for (int i = rank; counts && i < mine; i += threads) {
    load<S, U, Memory::kShared>(student + i * kPack * size_student, teacher + i * kPack * size_teacher, P, s, t);
    add<T, kPack, D::kTeacherEntropy, kParted>(own.sums, hard_sums, s, t, r, P.hard);
  }
  const Sums<T> all = combine_over_row(own, room.sums, first_warp, warps, block_warps).sums;
  const Sums<T> k = sums_of_softmax<D>(all, counts);
  HardRow<T>* hard = nullptr;
  if (P.hard.target) {
    if (counts && edges && rank == 0) read_target<kParted, S, U>(P, row, L.student, L.teacher, hard_sums);
    hard_sums = rebased<kParted>(hard_sums, own.sums, k);
    hard_sums = combine_over_row(hard_sums, room.hard, first_warp, warps, block_warps);
    hard_sums = completed<kParted>(hard_sums, all, r);
    if (counts) {
      hard = room.hard_rows + first_warp + rank / 32;
      if (rank % 32 == 0) *hard = hard_row<kParted>(P, row, r, k, hard_sums);
      if (edges && rank == 0) save_hard<kParted>(P, row, r, k, hard_sums);
      __syncwarp();
    }
  }

  const bool write = P.grad.data != nullptr,
             possible = counts && k.sum_student != T(0) && k.sum_teacher != T(0) && !P.hard.without_soft();
  const RowSoftmax<T> softmax(r, k.max_student, k.sum_student, k.max_teacher, k.sum_teacher);
  const double parameter = P.parameter[exists ? row : 0], second = P.second_parameter[exists ? row : 0];
  LossSums<T> sums = LossSums<T>::empty();
  with_functor<D>(parameter, second, [&](const auto& divergence) {
    for (int64_t i = rank; possible && edges && i < L.edges; i += threads) {
      load_class(L, P, L.edge(i), s1, t1);
      leave_out<kParted>(parted, L.edge(i), 1, s1, t1);
      reduce(s1, t1, softmax, divergence, r.grad_scale, hard, L.edge(i), 1, sums, grad1);
      if (D::kCentred && write) store_class(L, P, L.edge(i), grad1[0]);
    }
    for (int i = rank; possible && i < mine; i += threads) {
      load<S, U, Memory::kShared>(student + i * kPack * size_student, teacher + i * kPack * size_teacher, P, s, t);
      reduce(s, t, softmax, divergence, r.grad_scale, hard, L.pack(first + i), 1, sums, grad);
      if (D::kCentred && write) store_pack<S>(L.grad + L.pack(first + i) * size_student, P.grad.dtype, grad);
    }
  });
  sums = of_row<T, D>(combine_over_row(sums, room.losses, first_warp, warps, block_warps));
  const T grad_scale = kTwoSums<D> ? r.grad_scale * sums.second : r.grad_scale;
  if (edges && rank == 0) {
    if (counts) {
      save<T, D>(P, row, k, sums, r);
    } else {
      save_nothing(P, row);
    }
  }
  if (write && (!possible || (!D::kCentred && no_gradient(k.sum_student, k.sum_teacher, sums.slope)))) {
    hard_grad<kParted>(P, L, first + rank, first + mine, threads, edges ? rank : L.edges, threads, hard);
  } else if (write && !D::kCentred) {
    with_functor<D>(parameter, second, [&](const auto& divergence) {
      for (int64_t i = rank; edges && i < L.edges; i += threads) {
        load_class(L, P, L.edge(i), s1, t1);
        gradient(s1, t1, softmax, divergence, grad_scale, sums.slope, hard, L.edge(i), 1, grad1);
        store_class(L, P, L.edge(i), grad1[0]);
      }
      for (int i = rank; i < mine; i += threads) {
        load<S, U, Memory::kShared>(student + i * kPack * size_student, teacher + i * kPack * size_teacher, P, s, t);
        gradient(s, t, softmax, divergence, grad_scale, sums.slope, hard, L.pack(first + i), 1, grad);
        store_pack<S>(L.grad + L.pack(first + i) * size_student, P.grad.dtype, grad);
      }
    });
  }
  if (ptx::cluster_size() > 1) ptx::cluster_barrier();  // others may still read this block's room
}

}  // namespace fastkd::cuda
