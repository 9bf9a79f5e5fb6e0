// The dist schedule compiled for one instruction set, as the binding sees it.
#pragma once
#include "common/dist_params.h"
#include "math/correlation.h"

namespace fastkd {

inline constexpr int64_t kDistChunk = 128;  // rows at most whose columns are summed in T
inline constexpr int64_t kDistBlock = 512;  // classes whose sums stay in the first-level cache
inline constexpr int64_t kDistArrays = 11;  // three values of one row, and eight sums of what the others differ

FASTKD_HD constexpr int64_t dist_blocks(int64_t V) { return (V + kDistBlock - 1) / kDistBlock; }

// The sums of a chunk of rows over each class.
template <class T>
struct DistChunk {
  T* sums;  // [blocks, kDistArrays, stride]
  int64_t V, count = 0;
  double losses = 0;  // of its rows

  // Not a power of 2, so that the arrays do not want the same lines of the cache.
  static FASTKD_HD int64_t stride(int64_t V) { return dist_padded(V < kDistBlock ? V : kDistBlock) + kDistPadding; }
  static FASTKD_HD int64_t size(int64_t V) { return dist_blocks(V) * kDistArrays * stride(V); }
  FASTKD_HD T* block(int64_t b) const { return sums + b * kDistArrays * stride(V); }
};

template <class T>
struct DistKernel {
  // rows begin .. end: P.of_rows and the chunk
  void (*chunk)(const DistParams<T>& P, int64_t begin, int64_t end, DistChunk<T>& chunk);
  // adds a chunk to the columns of block b, [V]
  void (*add)(const DistChunk<T>& chunk, int64_t b, ColumnMoments* columns);
  // the gradient of rows begin .. end; memory: [2, padded V]
  void (*gradient)(const DistParams<T>& P, T* memory, int64_t begin, int64_t end);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const DistKernel<T>& dist_kernel();
}
namespace avx2 {
template <class T>
const DistKernel<T>& dist_kernel();
}
namespace avx512 {
template <class T>
const DistKernel<T>& dist_kernel();
}

}  // namespace fastkd
