// What a schedule is told: plain sizes, strides and pointers. No torch header reaches a kernel.
#pragma once
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

enum class DType : int32_t { kHalf, kBFloat16, kFloat, kDouble };

// The numbers are those of fastkd/ops/rows.py.
enum class Divergence : int64_t { kForwardKL };
enum class Reduction : int64_t { kNone, kSum, kBatchMean, kMean };

inline constexpr int kMaxLeadingDims = 16;

// A tensor [*, V] with any strides, seen as N rows.
struct RowsTensor {
  char* data;  // null when absent
  DType dtype;
  int32_t element_size;
  int32_t dims;                     // leading dimensions
  int64_t size[kMaxLeadingDims];    // [dims]
  int64_t stride[kMaxLeadingDims];  // [dims], in elements
  int64_t stride_v;                 // of the class dimension, in elements

  FASTKD_HD char* row(int64_t n) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += n % size[d] * stride[d];
      n /= size[d];
    }
    if (dims > 0) offset += n * stride[0];
    return data + offset * element_size;
  }
};

// T is the type that is computed in: float, or double where an input is double.
template <class T>
struct RowsParams {
  Divergence divergence;
  int64_t N, V;
  RowsTensor student, teacher;  // [N, V]
  RowsTensor grad;              // [N, V], the student's dtype; the student itself when in place
  const T* temperature;         // [N], or null: temperature_all
  const T* teacher_temperature;
  double temperature_all, teacher_temperature_all;
  bool t_squared;
  const bool* mask;         // [N], or null: every row counts
  const T* weight;          // [N], or null: 1
  const T* upstream;        // [N], or null: 1
  int64_t upstream_stride;  // 0: one upstream for all rows
  double grad_scale;        // 1 / divisor of the reduction
  T* loss;                  // [N]
  double* stats;            // [N, 4], or null
  bool stream;              // write the gradient past the caches
  bool prefetch;            // this row and the next fit the second-level cache
};

}  // namespace fastkd
