// Matrix products by the BLAS that torch carries. Called inside a parallel region they run on the
// calling thread alone; outside on all of torch's threads, and how the BLAS deals a product out to them may
// change its last bits.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
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

// f(0) .. f(tasks - 1), each on one thread, also where it multiplies matrices: a parallel region has two
// tasks at the least.
template <class F>
void for_each(int64_t tasks, F&& f) {
  torch::stable::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < std::min(end, tasks); ++task) f(task);
  });
}

// out = a b, some rows at a time, each on one thread: the bits do not depend on the number of threads.
template <class T>
void gemm_by_rows(const Matrix<T>& out, const Matrix<T>& a, const Matrix<T>& b) {
  constexpr int64_t kRows = 64;  // products of fewer rows are slower
  for_each((out.rows + kRows - 1) / kRows, [&](int64_t task) {
    const auto rows = [&](const Matrix<T>& m) {
      const int64_t first = task * kRows;
      return Matrix<T>{m.data + first * m.row_stride, std::min(kRows, m.rows - first), m.columns, m.row_stride,
                       m.column_stride};
    };
    gemm(rows(out), rows(a), b);
  });
}

}  // namespace fastkd
