// The weights of adaptive_kl_div compiled for one instruction set, as the binding sees them.
#pragma once
#include "cpu/rows_kernel.h"

namespace fastkd {

template <class T>
struct HeadKernel {
  // Of rows begin .. end, each by itself: weight [N]; P.parameter is mu.
  void (*rows)(const RowsParams<T>& P, void* memory, int64_t begin, int64_t end, double* weight);
  // The same of a group of rows, as RowsLanes takes them, each in a lane of its own.
  void (*lanes)(const RowsParams<T>& P, void* memory, int64_t begin, int64_t end, double* weight);

  // of memory
  static constexpr int64_t rows_bytes(int64_t V) { return rows_blocks(V) * kRowsBlock * 4 * int64_t(sizeof(T)); }
  static constexpr int64_t lanes_bytes(int64_t V, int64_t rows) { return RowsLanes<T>::bytes(V, rows, true); }
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const HeadKernel<T>& head_kernel();
}  // namespace baseline
namespace avx2 {
template <class T>
const HeadKernel<T>& head_kernel();
}  // namespace avx2
namespace avx512 {
template <class T>
const HeadKernel<T>& head_kernel();
}  // namespace avx512

}  // namespace fastkd
