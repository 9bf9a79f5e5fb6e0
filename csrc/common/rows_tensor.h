// How the rows of a tensor lie in memory.
#pragma once
#include "common/arguments.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/params.h"

namespace fastkd {

// The rows are what all dimensions but one step through, in their order.
inline RowsTensor rows_tensor(const Tensor& x, void* data, const char* name, int64_t of_row) {
  RowsTensor r{};
  r.data = static_cast<char*>(data);
  r.dtype = to_dtype(x.scalar_type(), name);
  r.element_size = int32_t(x.element_size());
  r.stride_v = x.stride(of_row);
  for (int64_t d = 0; d < x.dim(); ++d) {  // dimensions that lie one after the other in memory are one
    const int64_t size = x.size(d), stride = x.stride(d);
    if (d == of_row || size == 1) continue;
    if (r.dims > 0 && r.stride[r.dims - 1] == size * stride) {
      r.size[r.dims - 1] *= size;
      r.stride[r.dims - 1] = stride;
      continue;
    }
    FASTKD_CHECK(r.dims < kMaxLeadingDims, name, ": more than ", kMaxLeadingDims, " separate leading dimensions");
    r.size[r.dims] = size;
    r.stride[r.dims] = stride;
    ++r.dims;
  }
  return r;
}

inline RowsTensor rows_tensor(const Tensor& x, void* data, const char* name) {
  return rows_tensor(x, data, name, x.dim() - 1);
}

}  // namespace fastkd
