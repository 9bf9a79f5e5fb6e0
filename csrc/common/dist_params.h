// What the dist schedule is told of a call.
#pragma once
#include "common/rows_params.h"

namespace fastkd {

// What is kept of a row: its softmax, and its slopes, those of math/correlation.h times what the row counts for.
struct DistRow {
  double max_student, sum_student, max_teacher, sum_teacher, slope, own;
};

inline constexpr int64_t kDistPadding = 16;  // classes
FASTKD_HD constexpr int64_t dist_padded(int64_t V) { return (V + kDistPadding - 1) / kDistPadding * kDistPadding; }

// The slopes of columns lie in one array after the other, [3, padded V]: slope, own, and what is added to both
// products.
template <class T>
struct DistParams {
  RowsParams<T> rows;  // student, teacher, grad, mask, N, V, temperature; 1 / rows that count as the scale
  double inter_weight, intra_weight, temperature, eps;
  DistRow* of_rows;   // [N]
  T* columns;         // [3, padded V]
  const T* upstream;  // []
};

}  // namespace fastkd
