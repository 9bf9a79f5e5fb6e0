// Matrix products by the BLAS that torch carries. Called inside a parallel region they run on the
// calling thread alone; outside on all of torch's threads.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <type_traits>

#include "common/check.h"

extern "C" AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                                   AtenTensorHandle mat2, double beta, double alpha);

namespace fastkd {

// A view of memory; either stride is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

namespace detail {

class TensorView {
 public:
  template <class T>
  explicit TensorView(const Matrix<T>& m) {
    const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
    const int32_t type = std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    FASTKD_CHECK(aoti_torch_create_tensor_from_blob(const_cast<T*>(m.data), 2, sizes, strides, 0, type,
                                                    aoti_torch_device_type_cpu(), 0, &handle) == AOTI_TORCH_SUCCESS,
                 "a matrix of ", m.rows, " x ", m.columns, " could not be made a tensor");
  }
  TensorView(const TensorView&) = delete;
  ~TensorView() { aoti_torch_delete_tensor_object(handle); }
  AtenTensorHandle handle;
};

}  // namespace detail

// out = beta out + alpha a b; out is not read where beta is 0
template <class T>
void gemm(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b, double alpha = 1, double beta = 0) {
  const detail::TensorView o(out), left(a), right(b);
  FASTKD_CHECK(
      aoti_torch_cpu_addmm_out(o.handle, o.handle, left.handle, right.handle, beta, alpha) == AOTI_TORCH_SUCCESS,
      "the matrix product of ", a.rows, " x ", a.columns, " and ", b.rows, " x ", b.columns, " failed");
}

}  // namespace fastkd
