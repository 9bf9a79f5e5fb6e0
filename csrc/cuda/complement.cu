// The launches of what is beside K classes of a row.
#include "cuda/complement_kernel.cuh"
#include "cuda/launch.cuh"
#include "cuda/rows_plan.h"

namespace fastkd::cuda {

inline constexpr int64_t kMostWords = 8192;  // of bits, 32 KB: so that several blocks share a multiprocessor

template <class T>
cudaError_t complement(const ComplementParams<T>& P, bool backward, cudaStream_t stream) {
  const int threads = threads_for(P.rows.V / kPack), rows = std::max(1, 128 / threads);
  static_assert(kPlanThreads == kStandardizeThreads);
  const int64_t blocks = (P.rows.N + rows - 1) / rows;
  if (backward) return Launch(blocks, dim3(threads, rows), 0, stream)(complement_bwd_kernel<T>, P);
  int shift = 0;
  const auto words = [&] { return (((P.rows.V - 1) >> shift) + 32) / 32 + 1; };  // and one behind them
  while (words() * rows > kMostWords) ++shift;
  const int64_t room = ((threads * rows / 32 + 1) * int64_t(sizeof(RestSums<T>)) + 15) / 16 * 16;
  const Launch launch(blocks, dim3(threads, rows), room + words() * rows * 4, stream);
  return launch(complement_fwd_kernel<T>, P, words(), shift, room);
}

template cudaError_t complement<float>(const ComplementParams<float>&, bool, cudaStream_t);
template cudaError_t complement<double>(const ComplementParams<double>&, bool, cudaStream_t);

}  // namespace fastkd::cuda
