// Launches of the dist schedule.
#include <algorithm>

#include "cuda/dist_kernel.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows_storage.cuh"

namespace fastkd::cuda {
namespace {

constexpr int64_t kShortRow = 256;                    // classes: a warp a row
constexpr int64_t kRowsOfThread = 16;                 // at least, going down a chunk
constexpr int64_t kParts = 65536, kFewestChunks = 8;  // of all chunks, as far as these are not fewer

// Whether neighbouring rows lie next to each other, and the classes of a row do not.
template <class T>
bool side_by_side(const RowsParams<T>& P) {
  for (const RowsTensor* x : {&P.student, &P.teacher, &P.grad}) {
    if (!x->data) continue;
    if (x->dims == 0 || x->stride[x->dims - 1] != 1 || x->stride_v == 1) return false;
  }
  return true;
}

// f(threads of a row)
template <class T, class F>
cudaError_t with_team(const RowsParams<T>& P, F&& f) {
  if (side_by_side(P)) return f(std::integral_constant<int, 1>());
  if (P.V <= kShortRow) return f(std::integral_constant<int, 32>());
  return f(std::integral_constant<int, kDistThreads>());
}

template <class T>
Launch launch_rows(const RowsParams<T>& P, int team, cudaStream_t stream) {
  const int64_t rows = kDistThreads / team;
  return Launch((P.N + rows - 1) / rows, dim3(kDistThreads), sizeof(DistRoom<T>), stream);
}

template <class T>
cudaError_t columns(const DistParams<T>& P, const DistWorkspace& W, cudaStream_t stream) {
  return with_storage(P.rows, [&](auto storage) {
    using S = decltype(storage);
    const auto launch = [&](auto across) {
      constexpr int kAcross = across.value;
      constexpr int64_t kClasses = kDistClasses * kAcross;
      const Launch go((P.rows.V + kClasses - 1) / kClasses * W.chunks, dim3(kDistThreads),
                      kDistThreads * sizeof(ColumnMoments), stream);
      return go(dist_columns_kernel<T, S, kAcross>, P, W.parts, W.chunks);
    };
    if (side_by_side(P.rows)) return launch(std::integral_constant<int, 1>());
    return launch(std::integral_constant<int, 32>());
  });
}

}  // namespace

int64_t dist_chunks(int64_t N, int64_t V) {
  return std::min(std::max(kParts / V, kFewestChunks), std::max<int64_t>(N / (8 * kRowsOfThread), 1));
}

template <class T>
cudaError_t dist_forward(const DistParams<T>& P, const DistWorkspace& W, T* loss, cudaStream_t stream) {
  if (P.rows.N > 0) {
    FASTKD_CUDA_RETURN(with_storage(P.rows, [&](auto storage) {
      return with_team(P.rows, [&](auto team) {
        return launch_rows(P.rows, team.value, stream)(dist_rows_kernel<T, decltype(storage), team.value>, P,
                                                       W.row_losses);
      });
    }));
    if (W.chunks > 0) FASTKD_CUDA_RETURN(columns(P, W, stream));
  }
  const Launch slopes((dist_padded(P.rows.V) + kDistThreads - 1) / kDistThreads, dim3(kDistThreads), 0, stream);
  FASTKD_CUDA_RETURN(slopes(dist_slopes_kernel<T>, P, W.parts, P.rows.N > 0 ? W.chunks : 0, W.column_losses));
  const Launch sum(1, dim3(kDistSumThreads), 2 * kDistSumThreads / 32 * sizeof(double), stream);
  return sum(dist_sum_kernel<T>, P, W.row_losses, W.column_losses, loss);
}

template <class T>
cudaError_t dist_backward(const DistParams<T>& P, cudaStream_t stream) {
  return with_storage(P.rows, [&](auto storage) {
    return with_team(P.rows, [&](auto team) {
      return launch_rows(P.rows, team.value, stream)(dist_gradient_kernel<T, decltype(storage), team.value>, P);
    });
  });
}

#define FASTKD_INSTANTIATE(T)                                                                         \
  template cudaError_t dist_forward<T>(const DistParams<T>&, const DistWorkspace&, T*, cudaStream_t); \
  template cudaError_t dist_backward<T>(const DistParams<T>&, cudaStream_t);
FASTKD_INSTANTIATE(float)
FASTKD_INSTANTIATE(double)

}  // namespace fastkd::cuda
