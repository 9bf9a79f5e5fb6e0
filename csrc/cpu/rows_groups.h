// How the rows of a call on the CPU are dealt out: to threads, and to the lanes of vectors.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "cpu/rows_kernel.h"

namespace fastkd {

inline int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return int64_t(1) << 20;
}

// Groups of rows that are computed together, each in a lane of its own.
struct Groups {
  int64_t inner = 1;  // rows in a run, with one step between neighbours in every tensor
  int64_t rows = 0;   // of a group; 0: a row is computed by itself
  int64_t in_run = 0, count = 0;

  // rows begin .. end of a group
  std::pair<int64_t, int64_t> of(int64_t group) const {
    const int64_t run = group / in_run * inner, begin = group % in_run * rows;
    return {run + begin, run + std::min(begin + rows, inner)};
  }
};

// Rows of so few classes are computed faster together, wherever they lie.
inline constexpr int64_t kFewClasses = 64;
inline constexpr int64_t kFewRows = 8;  // that leave most lanes without a row

// four: the workspace has four arrays, as where rows have targets.
template <class T>
Groups groups_of(const RowsParams<T>& P, bool four) {
  Groups groups;
  const RowsTensor* tensors[] = {&P.student, &P.teacher, &P.grad};
  bool side_by_side = true;
  groups.inner = P.N;
  for (const RowsTensor* x : tensors) {
    if (!x->data || x->dims == 0) continue;
    groups.inner = std::min(groups.inner, x->size[x->dims - 1]);
    side_by_side = side_by_side && x->stride[x->dims - 1] == 1 && x->stride_v != 1;
  }
  if (groups.inner < kFewRows || !(side_by_side || P.V <= kFewClasses)) return groups;
  for (const RowsTensor* x : tensors) {
    if (x->data && x->dims > 0 && x->size[x->dims - 1] % groups.inner != 0) return groups;
  }
  constexpr int64_t kLeast = 16;  // a vector of the widest
  int64_t rows = kMostLanes;
  while (rows > kLeast && RowsLanes<T>::bytes(P.V, rows, four) > second_level_cache() / 2) rows /= 2;
  if (RowsLanes<T>::bytes(P.V, rows, four) > 2 * second_level_cache()) return groups;
  groups.rows = rows;
  groups.in_run = (groups.inner + rows - 1) / rows;
  groups.count = P.N / groups.inner * groups.in_run;
  return groups;
}

inline constexpr int64_t kGrain = 16384;  // classes that are worth a thread
inline int64_t row_grain(int64_t V) { return (kGrain + V - 1) / V; }

inline int64_t group_grain(int64_t V, const Groups& groups) { return row_grain(V * groups.rows); }

}  // namespace fastkd
