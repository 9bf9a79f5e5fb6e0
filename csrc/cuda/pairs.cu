// Launches of the pairs schedule, for one storage: FASTKD_PAIRS_STORAGE names it.
#include "cuda/launch.cuh"
#include "cuda/pairs_kernel.cuh"

namespace fastkd::cuda {
namespace {

template <class S, class R>
cudaError_t run(const PairsParams& P, const Device& device, cudaStream_t stream) {
  using T = Compute<S>;
  constexpr int64_t kRoom = sizeof(PairsRoom<T>);
  const dim3 threads(kPairsThreads);
  if constexpr (pairs_layout(kStorageOf<S>).centred) FASTKD_CUDA_RETURN(embeddings_means(P, stream));
  FASTKD_CUDA_RETURN(embeddings_copy<S>(P, stream));
  const Launch sweep(P.sweep_blocks, threads, kRoom, stream, device.shared_memory);
  if (R::measures(P.options)) FASTKD_CUDA_RETURN(sweep(pairs_sweep_kernel<S, R, Sweep::kMeasure>, P));
  FASTKD_CUDA_RETURN(sweep(pairs_sweep_kernel<S, R, Sweep::kLoss>, P));
  int64_t blocks = 1;
  if (P.grad) {
    const Launch gradient(P.tiles * P.slices * P.splits, threads, kRoom, stream, device.shared_memory);
    FASTKD_CUDA_RETURN(gradient(pairs_gradient_kernel<S, R>, P));
    const int64_t elements = P.options.N * P.student.source.D;
    blocks = std::min<int64_t>((elements + kPairsThreads - 1) / kPairsThreads, 8 * int64_t(device.multiprocessors));
  }
  return Launch(blocks, threads, 2 * kPairsWarps * sizeof(double), stream)(pairs_finish_kernel<T, R>, P);
}

}  // namespace

template <PairsStorage kStorage, Relation kRelation>
cudaError_t pairs_run(const PairsParams& P, const Device& device, cudaStream_t stream) {
  using S = typename PairsTypes<kStorage>::Storage;
#define FASTKD_CASE(name) \
  if constexpr (kRelation == Relation::k##name) return run<S, FASTKD_ISA::name<Compute<S>>>(P, device, stream);
  FASTKD_FOR_EACH_RELATION(FASTKD_CASE)
#undef FASTKD_CASE
}

#define FASTKD_STORAGE_OF_(name) PairsStorage::k##name
#define FASTKD_STORAGE_OF(name) FASTKD_STORAGE_OF_(name)
#define FASTKD_INSTANTIATE(relation)                                                              \
  template cudaError_t pairs_run<FASTKD_STORAGE_OF(FASTKD_PAIRS_STORAGE), Relation::k##relation>( \
      const PairsParams&, const Device&, cudaStream_t);
FASTKD_FOR_EACH_RELATION(FASTKD_INSTANTIATE)

}  // namespace fastkd::cuda
