// What the kernels are told that standardize logits: (x - mean) / (deviation + 1e-7) of each row.
#pragma once
#include "common/rows_params.h"

namespace fastkd {

inline constexpr double kStandardizeEps = 1e-7;

// Of the classes of a row that are not -inf. The deviation is that of a sample; 0 of a row whose classes are all equal.
struct RowMoments {
  double mean, deviation, count;

  FASTKD_HD double inverse() const { return 1 / (deviation + kStandardizeEps); }
  // What c sum(g c) is multiplied by in the gradient, before that is multiplied by inverse(); see ops/standardize.py.
  FASTKD_HD double curvature() const {
    return deviation == 0 ? 0 : 1 / ((count - 1) * deviation * (deviation + kStandardizeEps));
  }
};

// x is rows.student. Forward: rows.grad is what becomes of it. Backward: rows.teacher is the gradient with respect to
// that, and rows.grad the one of x.
template <class T>
struct StandardizeParams {
  RowsParams<T> rows;
  RowMoments* moments;  // [N], or null
  const char* addend;   // a gradient of x itself, which lies as rows.teacher does; or null
};

// How many rows lie side by side in every tensor, their elements of a class one after the other; 0: none do.
template <class T>
FASTKD_HD int64_t side_by_side(const StandardizeParams<T>& P) {
  const RowsTensor* tensors[] = {&P.rows.student, &P.rows.teacher, &P.rows.grad};
  int64_t run = P.rows.N;
  for (const RowsTensor* x : tensors) {
    if (x->dims == 0 || x->stride[x->dims - 1] != 1 || x->stride_v == 1) return 0;
    run = x->size[x->dims - 1] < run ? x->size[x->dims - 1] : run;
  }
  for (const RowsTensor* x : tensors) {
    if (x->size[x->dims - 1] % run != 0) return 0;
  }
  return run;
}

}  // namespace fastkd
