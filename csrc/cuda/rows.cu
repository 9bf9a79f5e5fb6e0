// Launches of the rows schedule, for one divergence: FASTKD_DIVERGENCE names it.
#include "cuda/launch.cuh"
#include "cuda/rows_lanes.cuh"
#include "cuda/rows_plan.h"
#include "cuda/rows_split.cuh"
#include "cuda/rows_statistics.cuh"
#include "cuda/rows_storage.cuh"

namespace fastkd::cuda {
namespace {

template <class T>
using Functor = FASTKD_DIVERGENCE<T>;

template <class T, class S>
cudaError_t on_chip(const RowsParams<T>& P, const RowsPlan& plan, const Device& device, cudaStream_t stream) {
  static_assert(sizeof(RowsRoom<T, true>) <= kRoomBytes);
  Launch launch((P.N + plan.rows_of_block - 1) / plan.rows_of_block * plan.cluster,
                dim3(plan.threads, plan.rows_of_block), plan.shared_bytes, stream, device.shared_memory);
  launch.cluster(plan.cluster);
  return launch(rows_kernel<T, S, S, Functor<T>>, P, plan.packs);
}

int64_t lanes_blocks(int64_t N, const RowsPlan& plan) { return N / plan.inner * plan.in_run; }

template <class T, class S>
cudaError_t side_by_side(const RowsParams<T>& P, const RowsPlan& plan, const Device& device, cudaStream_t stream) {
  static_assert(sizeof(Sums<T>) + sizeof(LossSums<T>) == 8 * sizeof(T) && sizeof(HardSums<T>) == 6 * sizeof(T));
  static_assert(kLanesPlanWarps == kLanesWarps);
  const Launch launch(lanes_blocks(P.N, plan), dim3(32, plan.threads / 32), plan.shared_bytes, stream,
                      device.shared_memory);
  return launch(rows_lanes_kernel<T, S, S, Functor<T>>, P, plan.inner, plan.in_run, plan.kept);
}

template <class T, class S>
cudaError_t split(const RowsParams<T>& P, const RowsPlan& plan, void* workspace, cudaStream_t stream) {
  using D = Functor<T>;
  constexpr int kRooms = kMaxThreads / 32 + 1;
  static_assert(kRooms * (sizeof(SharedSums<T, true>) + sizeof(HardSums<T>)) <= kRoomBytes);
  static_assert(sizeof(Sums<T>) + sizeof(LossSums<T>) + sizeof(HardSums<T>) == kPartValues * sizeof(T));
  const RowsParts<T> parts = parts_in<T>(workspace, P.N, plan.splits);
  for (int64_t row = 0; row < P.N; row += plan.wave_rows) {
    const int64_t rows = std::min(plan.wave_rows, P.N - row);
    const Launch launch(rows * plan.splits, dim3(plan.threads), plan.shared_bytes, stream);
    FASTKD_CUDA_RETURN(rows_statistics(P, parts, row, launch, D::kTeacherEntropy, kWithoutTarget<D>));
    FASTKD_CUDA_RETURN(launch(rows_reduce_kernel<T, S, S, D>, P, parts, row));
    if (!D::kCentred && P.grad.data) {
      FASTKD_CUDA_RETURN(launch(rows_gradient_kernel<T, S, S, D>, P, parts, row, row + rows));
    }
  }
  return Launch(P.N, dim3(32), 0, stream)(rows_finish_kernel<T, D>, P, parts);
}

}  // namespace

template <Divergence kWhich, class T>
cudaError_t rows_forward(const RowsParams<T>& P, const Device& device, void* workspace, cudaStream_t stream) {
  const RowsPlan plan = rows_plan(P, device);
  return with_storage(P, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (!std::is_same_v<S, AnyType>) {
      if (plan.inner > 0) return side_by_side<T, S>(P, plan, device, stream);
    }
    if constexpr (sizeof(T) == 4) {
      if (plan.on_chip) return on_chip<T, S>(P, plan, device, stream);
    }
    return split<T, S>(P, plan, workspace, stream);
  });
}

template <Divergence kWhich, class T>
cudaError_t rows_backward(const RowsParams<T>& P, const Device& device, cudaStream_t stream) {
  const int64_t packs = P.V / kPack;
  RowsParts<T> parts{nullptr, nullptr, nullptr, splits_for(P.N, packs, device)};
  const int threads = threads_for(packs / parts.splits);
  const int rows = parts.splits > 1 ? 1 : std::max(1, 128 / threads);
  const RowsPlan plan = rows_plan(P, device);
  return with_storage(P, [&](auto storage) {
    using S = decltype(storage);
    if constexpr (!std::is_same_v<S, AnyType>) {
      if (plan.inner > 0) {
        const Launch launch(lanes_blocks(P.N, plan), dim3(32, plan.threads / 32), 0, stream);
        return launch(rows_lanes_gradient_kernel<T, S, S, Functor<T>>, P, plan.inner, plan.in_run);
      }
    }
    const Launch launch((P.N + rows - 1) / rows * parts.splits, dim3(threads, rows), 0, stream);
    return launch(rows_gradient_kernel<T, S, S, Functor<T>>, P, parts, int64_t(0), P.N);
  });
}

template <Divergence kWhich, class T>
cudaError_t rows_sums(const RowsParams<T>& P, const Device& device, void* workspace, cudaStream_t stream) {
  const RowsPlan plan = rows_phase_plan(P, device);
  RowsParts<T> parts = parts_in<T>(workspace, P.N, plan.splits);
  parts.sums = nullptr;
  const Launch launch(P.N * plan.splits, dim3(plan.threads), plan.shared_bytes, stream);
  FASTKD_CUDA_RETURN(with_storage(P, [&](auto storage) {
    using S = decltype(storage);
    return launch(rows_reduce_kernel<T, S, S, Functor<T>>, P, parts, int64_t(0));
  }));
  return Launch(P.N, dim3(32), 0, stream)(rows_sums_kernel<T>, P, parts);
}

#define FASTKD_ENUMERATOR_OF_(name) Divergence::k##name
#define FASTKD_ENUMERATOR_OF(name) FASTKD_ENUMERATOR_OF_(name)
#define FASTKD_INSTANTIATE(T)                                                                                         \
  template cudaError_t rows_forward<FASTKD_ENUMERATOR_OF(FASTKD_DIVERGENCE), T>(const RowsParams<T>&, const Device&,  \
                                                                                void*, cudaStream_t);                 \
  template cudaError_t rows_backward<FASTKD_ENUMERATOR_OF(FASTKD_DIVERGENCE), T>(const RowsParams<T>&, const Device&, \
                                                                                 cudaStream_t);                       \
  template cudaError_t rows_sums<FASTKD_ENUMERATOR_OF(FASTKD_DIVERGENCE), T>(const RowsParams<T>&, const Device&,     \
                                                                             void*, cudaStream_t);
FASTKD_INSTANTIATE(float)
#if !defined(FASTKD_SINGLE)  // a program that never computes in double is spared its kernels
FASTKD_INSTANTIATE(double)
#endif

}  // namespace fastkd::cuda
