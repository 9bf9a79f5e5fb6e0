// What is done to one tile of pairs, compiled for one instruction set, as the schedule sees it.
#pragma once
#include <cstdint>

#include "common/embeddings_params.h"
#include "math/relation.h"

namespace fastkd {

// Pairs of a block of rows i with a block of rows j, of one side: first their inner products, then
// their measures, then (of the student) their weights.
template <class T>
struct PairsSide {
  T* tile;           // [rows, stride]
  const T* x_i;      // [rows, D], their rows x_stride apart; not centred: what differs there is exact
  const T* x_j;      // [columns, D]
  const T* norms_i;  // [rows], squared, of the centred
  const T* norms_j;  // [columns]
  int64_t D, x_stride;
};

template <class T>
struct PairsTile {
  PairsSide<T> student, teacher;
  const T *half_weights_i, *half_weights_j;  // [rows], [columns]: a pair's weight is their sum; or null: it is 1
  int64_t rows, columns, stride;
  int64_t diagonal;  // row i = 0 is column `diagonal`; negative: no row meets itself
};

// One relation. Each over the rows begin .. end of a tile; sums: over its ordered pairs; known: over all.
template <class T>
struct PairsKernel {
  // squared norms of rows [n, D]
  void (*norms)(const T* x, int64_t n, int64_t D, T* norms);
  // inner products become measures; sums but for loss and slope. Returns whether any two of the student's
  // rows are near.
  bool (*measures)(const PairsTile<T>&, int64_t begin, int64_t end, RelationSums& sums);
  // sums.loss and slope
  void (*loss)(const PairsTile<T>&, const RelationOptions&, const RelationSums& known, int64_t begin, int64_t end,
               RelationSums& sums);
  // the same, and the student's measures become weights; row_sums[i] += , column_sums[j] += . Where any
  // are near, weights of near pairs go into the teacher's tile, and 0 where they were
  void (*weights)(const PairsTile<T>&, const RelationOptions&, const RelationSums& known, int64_t begin, int64_t end,
                  bool any_near, RelationSums& sums, T* row_sums, T* column_sums);
  // the student's measures become `error` times the weights of the slopes' sum
  void (*slope_weights)(const PairsTile<T>&, const RelationOptions&, const RelationSums& known, double error,
                        int64_t begin, int64_t end, bool any_near, T* row_sums, T* column_sums);
  // of the weights in the teacher's tile: out_i [rows, D] -= w (x_i - x_j), out_j [columns, D] += that
  void (*near)(const PairsTile<T>&, int64_t begin, int64_t end, T* out_i, T* out_j);

  double (*unclamped_slope)(const RelationOptions&, const RelationSums& known);
  bool (*matters)(const RelationOptions&, double error, double loss, double tolerance);
  bool (*needs_measures)(const RelationOptions&);
  double (*loss_scale)(const RelationOptions&);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const PairsKernel<T>& pairs_kernel(Relation, bool weighted);
}
namespace avx2 {
template <class T>
const PairsKernel<T>& pairs_kernel(Relation, bool weighted);
}
namespace avx512 {
template <class T>
const PairsKernel<T>& pairs_kernel(Relation, bool weighted);
}

}  // namespace fastkd
