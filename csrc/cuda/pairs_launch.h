// The pairs schedule's kernels, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>

#include "common/embeddings_params.h"
#include "cuda/rows_launch.h"
#include "math/relation.h"

namespace fastkd::cuda {

// What the tiles hold. Both sides the same: where they differ, what holds both exactly.
#define FASTKD_FOR_EACH_PAIRS_STORAGE(X) X(BFloat16) X(Half) X(Float) X(Double)
#define FASTKD_PAIRS_ENUMERATOR(name) k##name,
enum class PairsStorage { FASTKD_FOR_EACH_PAIRS_STORAGE(FASTKD_PAIRS_ENUMERATOR) kCount };
#undef FASTKD_PAIRS_ENUMERATOR

inline constexpr int kPairsTile = 64;  // rows and columns of a tile of pairs
inline constexpr int kPairsMaxSplits = 32;

inline PairsStorage pairs_storage(DType student, DType teacher) {
  if (student == DType::kDouble || teacher == DType::kDouble) return PairsStorage::kDouble;
  if (student != teacher || student == DType::kFloat) return PairsStorage::kFloat;
  return student == DType::kHalf ? PairsStorage::kHalf : PairsStorage::kBFloat16;
}

struct PairsSide {
  Embeddings source;  // [N, D]
  int64_t D_padded;
  char* rows;     // [N_padded, D_padded] as the tiles want them, 0 beyond N and D
  float* norms;   // [N_padded] squared, of those; none in double
  double* means;  // [D] that were subtracted; null: none
};

// loss = weight * relation(student, teacher); grad, too, where it is wanted.
struct PairsParams {
  RelationOptions options;
  double weight;
  bool accumulate;          // add to loss and grad
  const int64_t* count;     // []: rows from there on are not, options.N is a bound alone; or null: all rows are
  const void* row_weights;  // [N] of the compute type, or null: 1
  PairsSide student, teacher;
  void* loss;  // [] of the compute type
  void* grad;  // [N, D_s] contiguous, or null
  DType grad_dtype;
  int32_t grad_element_size;

  // What pairs_plan chooses
  int64_t tiles;       // of one dimension: N_padded / kPairsTile
  int slices, splits;  // of the gradient's columns; of the sum over j
  int sweep_blocks;
  double* measure_sums;  // [sweep_blocks, 2]
  double* loss_sums;     // [sweep_blocks, 2]
  char* partial;         // [splits, N_padded, D_padded of the student], compute type
};

struct PairsLayout {
  int storage_size, compute_size;
  int chunk;  // D is padded to a multiple of it
  int slice;  // columns of the gradient that a block makes
  bool centred, norms;
};
constexpr PairsLayout pairs_layout(PairsStorage storage) {
  switch (storage) {
    case PairsStorage::kDouble:
      return {8, 8, 16, 64, false, false};
    case PairsStorage::kFloat:
      return {4, 4, 32, 384, true, true};  // more would not fit the registers
    default:
      return {2, 4, 64, 512, false, true};
  }
}

// Chooses, and deals the workspace out; returns its bytes. Host code, by arithmetic alone.
inline int64_t pairs_plan(PairsParams& P, PairsStorage storage, const Device& device, char* workspace) {
  const PairsLayout L = pairs_layout(storage);
  const auto up = [](int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; };
  int64_t used = 0;
  const auto take = [&](auto*& p, int64_t bytes) {
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(workspace + used);
    used += up(bytes, 128);
  };
  const int64_t N_padded = up(P.options.N, kPairsTile);
  P.tiles = N_padded / kPairsTile;
  for (PairsSide* side : {&P.student, &P.teacher}) {
    side->D_padded = up(side->source.D, L.chunk);
    take(side->rows, N_padded * side->D_padded * L.storage_size);
    if (L.norms) take(side->norms, N_padded * int64_t(sizeof(float)));
    if (L.centred) take(side->means, side->source.D * int64_t(sizeof(double)));
  }
  P.sweep_blocks = int(std::min<int64_t>(P.tiles * (P.tiles + 1) / 2, 2 * device.multiprocessors));
  take(P.measure_sums, P.sweep_blocks * 2 * int64_t(sizeof(double)));
  take(P.loss_sums, P.sweep_blocks * 2 * int64_t(sizeof(double)));
  if (P.grad) {
    // A block a multiprocessor; a sum over j in parts only where there are fewer.
    P.slices = int((P.student.source.D + L.slice - 1) / L.slice);
    const int64_t blocks = std::max<int64_t>(P.tiles * P.slices, 1);
    P.splits =
        int(std::clamp<int64_t>(device.multiprocessors / blocks, 1, std::clamp<int64_t>(P.tiles, 1, kPairsMaxSplits)));
    take(P.partial, P.splits * N_padded * P.student.D_padded * L.compute_size);
  }
  return used;
}

// Everything, N >= 2. For one storage: FASTKD_PAIRS_STORAGE names it where it is compiled.
template <PairsStorage kStorage, Relation kRelation>
cudaError_t pairs_run(const PairsParams&, const Device&, cudaStream_t);

}  // namespace fastkd::cuda
