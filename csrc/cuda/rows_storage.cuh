// The storage types that kernels of rows are compiled for.
#pragma once
#include "common/rows_params.h"
#include "cuda/vec.cuh"

namespace fastkd::cuda {

// f(S()) with the type of both sides, where they have one. Mixtures, and everything in double, are looked at for each
// pack.
template <class T, class F>
cudaError_t with_storage(const RowsParams<T>& P, F&& f) {
  if constexpr (sizeof(T) == 4) {
    if (P.student.dtype == P.teacher.dtype) {
      if (P.student.dtype == DType::kHalf) return f(__half());
      if (P.student.dtype == DType::kBFloat16) return f(__nv_bfloat16());
      if (P.student.dtype == DType::kFloat) return f(float());
    }
  }
  return f(AnyType());
}

}  // namespace fastkd::cuda
