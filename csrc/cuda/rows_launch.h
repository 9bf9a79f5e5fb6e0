// The kernels of the rows schedule, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include "common/rows_params.h"

namespace fastkd::cuda {

// What a launch depends on beside its tensors.
struct Device {
  int multiprocessors;
  int shared_memory;  // bytes a block can have
  int l2_cache;       // bytes
  int compute_major;
};
cudaError_t current_device(Device&);

// Loss [N] (P.loss), gradient and statistics where they are wanted.
template <Divergence kWhich, class T>
cudaError_t rows_forward(const RowsParams<T>&, const Device&, void* workspace, cudaStream_t);
// The gradient from P.stats.
template <Divergence kWhich, class T>
cudaError_t rows_backward(const RowsParams<T>&, const Device&, cudaStream_t);

// P.stats of some of a row's classes; and P.sums of them, from P.stats of the row, with the gradient where it is known
// by then.
template <class T>
cudaError_t rows_statistics(const RowsParams<T>&, const Device&, void* workspace, cudaStream_t);
template <Divergence kWhich, class T>
cudaError_t rows_sums(const RowsParams<T>&, const Device&, void* workspace, cudaStream_t);

// P.parts, but for the soft losses, which rows_forward leaves there. Before it, as the gradient may be written over the
// student.
template <class T>
cudaError_t rows_parts(const RowsParams<T>&, cudaStream_t);

// What the sum over rows is multiplied by, where the host does not know it: 0 where no row counts,
// else 1 / normalizer, or 1 / (divisor * rows that count), or 1 / divisor.
struct RowsScale {
  const bool* mask;  // [N], or null
  int64_t N;
  const void* normalizer;  // T [], or null
  double divisor;
  bool per_row;
  double* scale;  // [], out
};
template <class T>
cudaError_t rows_scale(const RowsScale&, cudaStream_t);
// sum = scale * sum of loss [N]; 0 where the scale is.
template <class T>
cudaError_t rows_sum(const T* loss, int64_t N, double scale, const double* scale_in_memory, T* sum, cudaStream_t);

// x *= factor, of some x; nothing where factor is 1.
inline constexpr int kScaleParts = 64;
template <class T>
struct Scale {
  struct Part {
    char* x;
    int64_t n;  // elements
    DType type;
    int32_t size;         // of an element
    int32_t first_block;  // set by scale()
  } parts[kScaleParts];
  int32_t count;
  const T* factor;
};
template <class T>
cudaError_t scale(Scale<T>, const Device&, cudaStream_t);

}  // namespace fastkd::cuda
