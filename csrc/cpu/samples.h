// What the losses of few samples have in common on the CPU: embeddings as they are multiplied, and how rows are dealt
// to threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/arguments.h"
#include "common/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/samples_kernel.h"

namespace fastkd {

template <class T>
inline constexpr ScalarType kComputed = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

inline constexpr int64_t kSamplesWork = 16384;  // elements that are worth a thread

// f(row) of all rows, of so many elements each.
template <class F>
void for_rows(int64_t rows, int64_t width, F&& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kSamplesWork / std::max<int64_t>(1, width)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) f(row);
                              });
}

// How rows come to length 1; or that they do not.
struct Lengths {
  bool unit = false;
  double eps = 1e-12;
  Length how = Length::kAtLeast;
};

// Embeddings [N, D] as they are multiplied: in the dtype that is computed in, of length 1 where that is wanted, and 0
// where a row does not count, which may hold anything.
template <class T>
struct Embeddings {
  Embeddings(const Tensor& given, const bool* mask, const Lengths& lengths) : tensor(given) {
    const int64_t N = given.size(0), D = given.size(1);
    if (tensor.scalar_type() != kComputed<T> || tensor.stride(1) != 1 || (mask && !lengths.unit)) {
      tensor = torch::stable::new_empty(given, {N, D}, kComputed<T>);
      torch::stable::copy_(tensor, given);
    }
    if (lengths.unit) {
      const SamplesKernel<T>& kernel = FASTKD_OF_ISA(samples_kernel<T>());
      const Tensor source = tensor;
      tensor = torch::stable::new_empty(source, {N, D}, kComputed<T>);
      rows.resize(N);
      const T* x = static_cast<const T*>(source.const_data_ptr());
      T* u = static_cast<T*>(tensor.mutable_data_ptr());
      for_rows(N, D, [&](int64_t i) {
        if (!mask || mask[i]) {
          rows[i] = kernel.unit(x + i * source.stride(0), D, lengths.eps, lengths.how, u + i * D);
        } else {
          std::fill_n(u + i * D, D, T(0));
        }
      });
    } else if (mask) {
      T* x = static_cast<T*>(tensor.mutable_data_ptr());
      for (int64_t i = 0; i < N; ++i) {
        if (!mask[i]) std::fill_n(x + i * D, D, T(0));
      }
    }
    matrix = {static_cast<const T*>(tensor.const_data_ptr()), N, D, tensor.stride(0)};
  }

  // dL/dX of the embeddings as they were given, from that of these, in its memory [N, D].
  void through_lengths(T* grad) const {
    if (rows.empty()) return;
    const SamplesKernel<T>& kernel = FASTKD_OF_ISA(samples_kernel<T>());
    const int64_t D = matrix.columns;
    for_rows(matrix.rows, D, [&](int64_t i) { kernel.unit_backward(grad + i * D, matrix.data + i * D, D, rows[i]); });
  }

  Tensor tensor;
  std::vector<UnitRow> rows;  // of unit length: how each came to it
  Matrix<T> matrix;
};

// G + G^T of [N, N], in its memory.
template <class T>
void symmetrize(T* G, int64_t N) {
  const SamplesKernel<T>& kernel = FASTKD_OF_ISA(samples_kernel<T>());
  constexpr int64_t kRows = 16;
  for_rows((N + kRows - 1) / kRows, kRows * N,
           [&](int64_t block) { kernel.symmetrize(G, N, block * kRows, std::min((block + 1) * kRows, N)); });
}

// Loss and gradient of few samples: in the dtype that is computed in, and in that which is saved. f(loss, grad): grad
// is contiguous [N, D_s] in the former, or null.
template <class F>
void few_samples(StableIValue* stack, const Tensor& student, ScalarType compute, bool save, F&& f) {
  const ScalarType type = student.scalar_type();
  const int64_t N = student.size(0), D = student.size(1);
  // float16's range would be left before a loss scaler multiplies the gradient
  const ScalarType saved = type == ScalarType::Half ? ScalarType::Float : type;
  Tensor loss = torch::stable::new_empty(student, {}, compute);
  Tensor grad = save ? torch::stable::new_empty(student, {N, D}, saved) : torch::stable::new_empty(student, {0}, saved);
  Tensor computed = save && saved != compute ? torch::stable::new_empty(student, {N, D}, compute) : grad;
  f(loss, save ? &computed : nullptr);
  if (save && saved != compute) torch::stable::copy_(grad, computed);
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

}  // namespace fastkd
