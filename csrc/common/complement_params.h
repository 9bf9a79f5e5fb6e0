// What the kernels are told that sum what a row's logits are beside K of its classes: see fastkd/ops/top_k.py.
#pragma once
#include <cstdint>

#include "common/rows_params.h"

namespace fastkd {

// The classes beside the K: their maximum, and the sum of e^((z - max) / T). Of none: sum 0.
struct ComplementSums {
  double max, sum;
  // What each of their e^((z - max) / T) is multiplied by in the gradient.
  FASTKD_HD double share(double upstream) const { return sum == 0 ? 0 : upstream / sum; }
};

// Of rows: student, temperature and mask, and backward the gradient; there the teacher is what it has besides, or the
// student where it has nothing.
template <class T>
struct ComplementParams {
  RowsParams<T> rows;
  const int64_t* indices;  // [N, K], negative: padding
  int64_t K;
  double* logits;          // [N, K + 1], forward
  ComplementSums* sums;    // [N]
  const double* upstream;  // [N, K + 1], backward
  bool addend;
  const int64_t* sorted;  // [N, K], on the CPU: keys of those that there are, in their order, and kNoClass behind
};

// A class and which of the K it is, for sorting: neither is ever as large as 2^31.
inline constexpr int64_t kNoClass = INT64_MAX;
inline int64_t key_of(int64_t of_class, int64_t k) { return of_class << 31 | k; }
inline int64_t class_of(int64_t key) { return key >> 31; }
inline int64_t place_of(int64_t key) { return key & ((int64_t(1) << 31) - 1); }

}  // namespace fastkd
