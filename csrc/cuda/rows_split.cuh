// The passes of the rows schedule as kernels of their own, several blocks a row; see rows_kernel.cuh.
// All have grid (splits * rows) and take the rows from `first_row` on.
#pragma once
#include "cuda/rows_statistics.cuh"

namespace fastkd::cuda {

template <class T, class D>
__device__ Sums<T> all_sums(const RowsParts<T>& parts, int64_t row, const RowConstants<T>& r) {
  const int lane = threadIdx.x % 32;
  const Sums<T> mine = lane < parts.splits ? parts.sums[row * parts.splits + lane] : Sums<T>::empty();
  return SharedSums<T, D::kTeacherEntropy>::combine({mine, r.exp2_student, r.exp2_teacher}).sums;
}
template <class T, class D>
__device__ Sums<T> row_sums(const RowsParts<T>& parts, int64_t row, const RowConstants<T>& r) {
  return sums_of_softmax<D>(all_sums<T, D>(parts, row, r), true);
}

// k: the row's own, as row_sums has them.
template <class D, class T>
__device__ HardSums<T> row_hard(const RowsParams<T>& P, const RowsParts<T>& parts, int64_t row, const Sums<T>& k,
                                const RowConstants<T>& r) {
  constexpr bool kParted = kWithoutTarget<D>;
  if (!P.hard.target) return HardSums<T>::empty();
  const int64_t lane = threadIdx.x % 32, part = row * parts.splits + lane;
  HardSums<T> hard = HardSums<T>::empty();
  if (lane < parts.splits) hard = rebased<kParted>(parts.hard[part], parts.sums[part], k);
  Sums<T> all = k;
  if constexpr (given<D>() == Given::kLogOdds) all = all_sums<T, D>(parts, row, r);
  return completed<kParted>(HardSums<T>::combine(hard), all, r);
}

template <class T, class D>
__device__ LossSums<T> row_losses(const RowsParts<T>& parts, int64_t row) {
  const int lane = threadIdx.x % 32;
  return of_row<T, D>(
      LossSums<T>::combine(lane < parts.splits ? parts.losses[row * parts.splits + lane] : LossSums<T>::empty()));
}

template <class T>
__device__ Sums<T> sums_of(const RowsStats& saved) {
  return {T(saved.max_student), T(saved.sum_student), T(saved.max_teacher), T(saved.sum_teacher), T(0)};
}

// What soft_cross_entropy has besides, but for log(sum), where the classes here may be some of a row's.
template <class D, class T, int kCount>
__device__ __forceinline__ void add_entropy(const RowsParams<T>& P, const T (&t)[kCount], const RowSoftmax<T>& softmax,
                                            const RowConstants<T>& r, LossSums<T>& sums) {
  if constexpr (D::kTeacherEntropy && !kWithoutTarget<D>) {
    if (!P.sums) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T below = softmax.max_teacher - t[i];
      const T q = exp2_of(-below * softmax.exp2_teacher - softmax.log2_teacher);
      sums.loss += q == T(0) ? T(0) : q * (below * r.inv_teacher_temperature);
    }
  }
}

// Of P.sums and no parts.sums the rows' statistics are P.stats, and the classes here may be some of a row's.
template <class T, class S, class U, class D>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rows_reduce_kernel(const __grid_constant__ RowsParams<T> P, RowsParts<T> parts, int64_t first_row) {
  const int split = blockIdx.x % parts.splits, rank = threadIdx.x, threads = blockDim.x;
  const int64_t row = first_row + blockIdx.x / parts.splits;
  const RowLayout<S, U> L(P, row);
  const Slice<T> slice(L, split, parts.splits);
  const bool write = D::kCentred && P.grad.data;
  const bool counts = !P.mask || P.mask[row];
  constexpr bool kParted = kWithoutTarget<D>;
  const RowConstants<T> r = row_constants<kParted>(P, row);
  const int64_t parted = parted_target<kParted>(P, row);
  Sums<T> k{};
  HardRow<T> hard;
  if (counts && P.sums) {
    k = sums_of<T>(P.stats[row]);
    if (write && P.hard.target) hard = hard_row<kParted>(P, row, r, P.stats[row]);
  } else if (counts) {
    k = row_sums<T, D>(parts, row, r);
    if (write && P.hard.target) hard = hard_row<kParted>(P, row, r, k, row_hard<D>(P, parts, row, k, r));
  }
  if (k.sum_student == T(0) || k.sum_teacher == T(0) || P.hard.without_soft()) {
    if (rank == 0) parts.losses[row * parts.splits + split] = LossSums<T>::empty();
    if (write) hard_grad<kParted>(P, L, slice.begin + rank, slice.end, threads, slice.edge, slice.edge_step, &hard);
    return;
  }
  const RowSoftmax<T> softmax(r, k.max_student, k.sum_student, k.max_teacher, k.sum_teacher);
  LossSums<T> sums = LossSums<T>::empty();
  T s[kPack], t[kPack], s1[1], t1[1], grad[kPack], grad1[1];
  with_functor<D>(P.parameter[row], P.second_parameter[row], [&](const auto& divergence) {
    for (int64_t i = slice.edge; i < L.edges; i += slice.edge_step) {
      load_class(L, P, L.edge(i), s1, t1);
      leave_out<kParted>(parted, L.edge(i), 1, s1, t1);
      reduce(s1, t1, softmax, divergence, r.grad_scale, &hard, L.edge(i), 1, sums, grad1);
      add_entropy<D>(P, t1, softmax, r, sums);
      if (write) store_class(L, P, L.edge(i), grad1[0]);
    }
    // Backwards: what the pass before touched last is the likeliest to be in the L2.
    for (int64_t i = slice.end - 1 - rank; kInPacks<T> && i >= slice.begin; i -= threads) {
      const int64_t v = L.pack(i);
      const char *student = L.student + v * element_size<S>(P.student),
                 *teacher = L.teacher + v * element_size<U>(P.teacher);
      load<S, U, D::kCentred ? Memory::kGlobalLast : Memory::kGlobal>(student, teacher, P, s, t);
      leave_out<kParted>(parted, v, 1, s, t);
      reduce(s, t, softmax, divergence, r.grad_scale, &hard, v, 1, sums, grad);
      add_entropy<D>(P, t, softmax, r, sums);
      if (write) store_pack<S>(L.grad + v * element_size<S>(P.grad), P.grad.dtype, grad);
    }
  });
  LossSums<T>* room = reinterpret_cast<LossSums<T>*>(ptx::dynamic_shared());
  sums = combine_over_row(sums, room, 0, threads / 32, threads / 32);
  if (rank == 0) parts.losses[row * parts.splits + split] = sums;
}

// The gradient from the parts, or (parts.sums null) from the statistics that forward saved.
// block (threads of a row, rows).
template <class T, class S, class U, class D>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rows_gradient_kernel(const __grid_constant__ RowsParams<T> P, RowsParts<T> parts, int64_t first_row,
                         int64_t end_row) {
  const int split = blockIdx.x % parts.splits, rank = threadIdx.x, threads = blockDim.x;
  const int64_t row = first_row + int64_t(blockIdx.x / parts.splits) * blockDim.y + threadIdx.y;
  if (row >= end_row) return;
  const RowLayout<S, U> L(P, row);
  const Slice<T> slice(L, split, parts.splits);
  constexpr bool kParted = kWithoutTarget<D>;
  const RowConstants<T> r = row_constants<kParted>(P, row);
  const int64_t parted = parted_target<kParted>(P, row);
  Sums<T> k{};
  T slopes = 0, grad_scale = r.grad_scale;
  HardRow<T> hard;
  const bool counts = !P.mask || P.mask[row];
  if (counts) {
    if (parts.sums) {
      k = row_sums<T, D>(parts, row, r);
      const LossSums<T> sums = row_losses<T, D>(parts, row);
      slopes = sums.slope;
      if constexpr (kTwoSums<D>) grad_scale *= sums.second;
      if (P.hard.target) hard = hard_row<kParted>(P, row, r, k, row_hard<D>(P, parts, row, k, r));
    } else {
      const RowsStats& saved = P.stats[row];
      k = sums_of<T>(saved);
      slopes = T(saved.slope);
      if constexpr (kTwoSums<D>) grad_scale *= T(saved.factor);
      if (P.hard.target) hard = hard_row<kParted>(P, row, r, saved);
    }
  }
  if (no_gradient(k.sum_student, k.sum_teacher, slopes) || P.hard.without_soft()) {
    hard_grad<kParted>(P, L, slice.begin + rank, slice.end, threads, slice.edge, slice.edge_step, &hard);
    return;
  }
  const RowSoftmax<T> softmax(r, k.max_student, k.sum_student, k.max_teacher, k.sum_teacher);
  T s[kPack], t[kPack], s1[1], t1[1], grad[kPack], grad1[1];
  with_functor<D>(P.parameter[row], P.second_parameter[row], [&](const auto& divergence) {
    for (int64_t i = slice.edge; i < L.edges; i += slice.edge_step) {
      load_class(L, P, L.edge(i), s1, t1);
      leave_out<kParted>(parted, L.edge(i), 1, s1, t1);
      gradient(s1, t1, softmax, divergence, grad_scale, slopes, &hard, L.edge(i), 1, grad1);
      store_class(L, P, L.edge(i), grad1[0]);
    }
    for (int64_t i = slice.begin + rank; kInPacks<T> && i < slice.end; i += threads) {
      const int64_t v = L.pack(i);
      const char *student = L.student + v * element_size<S>(P.student),
                 *teacher = L.teacher + v * element_size<U>(P.teacher);
      load<S, U, Memory::kGlobalLast>(student, teacher, P, s, t);
      leave_out<kParted>(parted, v, 1, s, t);
      gradient(s, t, softmax, divergence, grad_scale, slopes, &hard, v, 1, grad);
      store_pack<S>(L.grad + v * element_size<S>(P.grad), P.grad.dtype, grad);
    }
  });
}

// What the classes here have in a row's loss, from its parts: a warp a row.
template <class T>
__global__ void rows_sums_kernel(const __grid_constant__ RowsParams<T> P, RowsParts<T> parts) {
  const int64_t row = blockIdx.x, lane = threadIdx.x;
  const bool counts = !P.mask || P.mask[row];
  const LossSums<T> sums = LossSums<T>::combine(counts && lane < parts.splits ? parts.losses[row * parts.splits + lane]
                                                                              : LossSums<T>::empty());
  if (lane == 0) P.sums[row] = {double(sums.loss), double(sums.slope), double(sums.second)};
}

// A row's loss from its parts: a warp a row.
template <class T, class D>
__global__ void rows_finish_kernel(const __grid_constant__ RowsParams<T> P, RowsParts<T> parts) {
  const int64_t row = blockIdx.x;
  if (P.mask && !P.mask[row]) {
    if (threadIdx.x == 0) save_nothing(P, row);
    return;
  }
  constexpr bool kParted = kWithoutTarget<D>;
  const RowConstants<T> r = row_constants<kParted>(P, row);
  const Sums<T> k = row_sums<T, D>(parts, row, r);
  const LossSums<T> sums = row_losses<T, D>(parts, row);
  const HardSums<T> hard = row_hard<D>(P, parts, row, k, r);
  if (threadIdx.x != 0) return;
  if (P.hard.target) save_hard<kParted>(P, row, r, k, hard);
  save<T, D>(P, row, k, sums, r);
}

}  // namespace fastkd::cuda
