// Launches of the first pass of the rows schedule, where it is a kernel of its own.
#include "cuda/rows_plan.h"
#include "cuda/rows_statistics.cuh"
#include "cuda/rows_storage.cuh"

namespace fastkd::cuda {
namespace {

template <class T, class S, class U, bool kEntropy, bool kParted>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rows_statistics_kernel(const __grid_constant__ RowsParams<T> P, RowsParts<T> parts, int64_t first_row) {
  using Shared = SharedSums<T, kEntropy>;
  const int split = blockIdx.x % parts.splits, rank = threadIdx.x, threads = blockDim.x;
  const int64_t row = first_row + blockIdx.x / parts.splits;
  if (P.mask && !P.mask[row]) return;
  const RowLayout<S, U> L(P, row);
  const Slice<T> slice(L, split, parts.splits);
  const RowConstants<T> r = row_constants(P, row);
  Shared own{Sums<T>::empty(), r.exp2_student, r.exp2_teacher};
  HardSums<T> hard = HardSums<T>::empty();
  const int64_t parted = parted_target<kParted>(P, row);
  T s[kPack], t[kPack], s1[1], t1[1];
  for (int64_t i = slice.edge; i < L.edges; i += slice.edge_step) {
    load_class(L, P, L.edge(i), s1, t1);
    leave_out<kParted>(parted, L.edge(i), 1, s1, t1);
    add<T, 1, kEntropy, kParted>(own.sums, hard, s1, t1, r, P.hard);
  }
  for (int64_t i = slice.begin + rank; kInPacks<T> && i < slice.end; i += threads) {
    const int64_t v = L.pack(i);
    load<S, U, Memory::kGlobal>(L.student + v * element_size<S>(P.student), L.teacher + v * element_size<U>(P.teacher),
                                P, s, t);
    leave_out<kParted>(parted, v, 1, s, t);
    add<T, kPack, kEntropy, kParted>(own.sums, hard, s, t, r, P.hard);
  }
  Shared* room = reinterpret_cast<Shared*>(ptx::dynamic_shared());
  const Sums<T> k = combine_over_row(own, room, 0, threads / 32, threads / 32).sums;
  if (rank == 0) parts.sums[row * parts.splits + split] = k;
  if (!P.hard.target) return;
  if (split == 0 && rank == 0) read_target<kParted, S, U>(P, row, L.student, L.teacher, hard);
  HardSums<T>* room_of_hard = reinterpret_cast<HardSums<T>*>(room + threads / 32 + 1);
  hard = rebased<kParted>(hard, own.sums, k);
  hard = combine_over_row(hard, room_of_hard, 0, threads / 32, threads / 32);
  if (rank == 0) parts.hard[row * parts.splits + split] = hard;
}

// What the splits of a row have left, as one: a warp a row.
template <class T>
__global__ void rows_save_statistics_kernel(const __grid_constant__ RowsParams<T> P, RowsParts<T> parts) {
  const int64_t row = blockIdx.x, lane = threadIdx.x, part = row * parts.splits + lane;
  if (P.mask && !P.mask[row]) {
    if (lane == 0) P.stats[row] = {};
    return;
  }
  const RowConstants<T> r = row_constants(P, row);
  const bool there = lane < parts.splits;
  const Sums<T> own = there ? parts.sums[part] : Sums<T>::empty();
  const Sums<T> k = SharedSums<T, false>::combine({own, r.exp2_student, r.exp2_teacher}).sums;
  HardSums<T> hard = HardSums<T>::empty();
  if (P.hard.target) {
    if (there) hard = rebased<false>(parts.hard[part], own, k);
    hard = completed<false>(HardSums<T>::combine(hard), k, r);
  }
  if (lane == 0) {
    P.stats[row] = {double(k.max_student), double(k.sum_student), double(k.max_teacher), double(k.sum_teacher), 0,
                    double(hard.sum),      double(hard.logits)};
  }
}

}  // namespace

template <class T>
cudaError_t rows_statistics(const RowsParams<T>& P, const RowsParts<T>& parts, int64_t first_row, const Launch& launch,
                            bool entropy, bool parted) {
  return with_storage(P, [&](auto storage) {
    using S = decltype(storage);
    if (parted) return launch(rows_statistics_kernel<T, S, S, true, true>, P, parts, first_row);
    if (entropy) return launch(rows_statistics_kernel<T, S, S, true, false>, P, parts, first_row);
    return launch(rows_statistics_kernel<T, S, S, false, false>, P, parts, first_row);
  });
}

template <class T>
cudaError_t rows_statistics(const RowsParams<T>& P, const Device& device, void* workspace, cudaStream_t stream) {
  const RowsPlan plan = rows_phase_plan(P, device);
  const RowsParts<T> parts = parts_in<T>(workspace, P.N, plan.splits);
  const Launch launch(P.N * plan.splits, dim3(plan.threads), plan.shared_bytes, stream);
  FASTKD_CUDA_RETURN(rows_statistics(P, parts, 0, launch, false, false));
  return Launch(P.N, dim3(32), 0, stream)(rows_save_statistics_kernel<T>, P, parts);
}

#define FASTKD_INSTANTIATE(T)                                                                                      \
  template cudaError_t rows_statistics<T>(const RowsParams<T>&, const Device&, void*, cudaStream_t);               \
  template cudaError_t rows_statistics<T>(const RowsParams<T>&, const RowsParts<T>&, int64_t, const Launch&, bool, \
                                          bool);
FASTKD_INSTANTIATE(float)
#if !defined(FASTKD_SINGLE)  // a program that never computes in double is spared its kernels
FASTKD_INSTANTIATE(double)
#endif

}  // namespace fastkd::cuda
