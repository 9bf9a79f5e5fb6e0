// What every schedule is told of its tensors: plain sizes, strides and pointers. No torch header reaches a kernel.
#pragma once
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

enum class DType : int32_t { kHalf, kBFloat16, kFloat, kDouble };

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

}  // namespace fastkd
