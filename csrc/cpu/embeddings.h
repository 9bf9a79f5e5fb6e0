// Embeddings as the relational losses see them on the CPU: in the compute type, one after the
// other, their mean subtracted. Distances do not change, and far fewer of their digits cancel.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"

namespace fastkd {

template <class T>
struct Centred {
  torch::stable::Tensor memory;
  const T* x;  // [N, D]
  int64_t N, D;

  const T* row(int64_t i) const { return x + i * D; }
};

// Subtracts from every column of x [N, D] its mean, which is summed in double and in the same
// order whatever the number of threads.
template <class T>
void centre_columns(T* x, int64_t N, int64_t D) {
  constexpr int64_t kColumns = 64, kWork = 65536;  // columns at a time; elements that are worth a thread
  const int64_t slices = (D + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kWork / (N * kColumns + 1));
  torch::stable::parallel_for(0, slices, grain, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      const int64_t begin = slice * kColumns, n = std::min(D - begin, kColumns);
      double mean[kColumns] = {};
      for (int64_t i = 0; i < N; ++i) {
        const T* row = x + i * D + begin;
        for (int64_t k = 0; k < n; ++k) mean[k] += double(row[k]);
      }
      for (int64_t k = 0; k < n; ++k) mean[k] /= double(N);
      for (int64_t i = 0; i < N; ++i) {
        T* row = x + i * D + begin;
        for (int64_t k = 0; k < n; ++k) row[k] = T(double(row[k]) - mean[k]);
      }
    }
  });
}

template <class T>
Centred<T> centre(const torch::stable::Tensor& embeddings) {
  using torch::stable::Tensor;
  const int64_t N = embeddings.size(0), D = embeddings.size(1);
  Tensor memory =
      torch::stable::new_empty(embeddings, {N, D}, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  torch::stable::copy_(memory, embeddings);
  T* x = static_cast<T*>(memory.mutable_data_ptr());
  centre_columns(x, N, D);
  return {memory, x, N, D};
}

}  // namespace fastkd
