// What the features schedule is told of one pair of tensors: plain sizes, strides and pointers.
#pragma once
#include "common/params.h"
#include "math/feature.h"

namespace fastkd {

inline constexpr int64_t kFlatRow = 4096;  // elements of a row of tensors whose rows do not matter

// One layer, in rows of features. Where rows do not matter both tensors are taken as they lie in
// memory, in rows of kFlatRow elements of which the last may be shorter.
struct FeaturesLayer {
  int64_t N, D;
  int64_t numel;                // of one tensor
  RowsTensor student, teacher;  // [N, D]
  RowsTensor grad;              // [N, D], the student's dtype, or none
  bool flat;
  const bool* mask;     // [N], or null: every row counts
  const void* weight;   // [N] of the compute dtype, or null: 1
  double layer_weight;  // of the layer's loss in the total
  int64_t first_row;    // of the layer among the rows of all layers

  FASTKD_HD int64_t width(int64_t row) const {
    const int64_t left = numel - row * D;
    return flat && left < D ? left : D;
  }
};

}  // namespace fastkd
