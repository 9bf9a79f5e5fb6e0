// Embeddings as the relational losses see them on the CPU: in the compute type, one after the
// other, their mean subtracted. Distances do not change, and far fewer of their digits cancel.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/dispatch.h"

namespace fastkd {

// How many rows are there, of a relational op's inputs.
template <class Inputs>
int64_t rows_there(const Inputs& in) {
  if (!in.count) return in.N();
  const int64_t count = *static_cast<const int64_t*>(in.count->const_data_ptr());
  FASTKD_CHECK(count >= 0 && count <= in.N(), "count: from 0 to ", in.N(), " wanted, got ", count);
  return count;
}

template <class T>
struct Centred {
  torch::stable::Tensor memory, source;
  const T* x;  // [N, D]
  int64_t N, D;
  // The same before the mean was subtracted, which rounds: for differences of close samples. Where the
  // embeddings come in fewer digits than T's, x itself.
  const T* exact;
  int64_t exact_stride;

  const T* row(int64_t i) const { return x + i * D; }
  const T* exact_row(int64_t i) const { return exact + i * exact_stride; }
};

// to [N, D] = from less the mean of each column, which is summed in double and in the same order
// whatever the number of threads.
template <class T>
void centre_columns(const T* from, int64_t stride, T* to, int64_t N, int64_t D) {
  constexpr int64_t kColumns = 64, kWork = 65536;  // columns at a time; elements that are worth a thread
  const int64_t slices = (D + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, kWork / (N * kColumns + 1));
  torch::stable::parallel_for(0, slices, grain, [&](int64_t first, int64_t last) {
    for (int64_t slice = first; slice < last; ++slice) {
      const int64_t begin = slice * kColumns, n = std::min(D - begin, kColumns);
      double mean[kColumns] = {};
      for (int64_t i = 0; i < N; ++i) {
        const T* row = from + i * stride + begin;
        for (int64_t k = 0; k < n; ++k) mean[k] += double(row[k]);
      }
      for (int64_t k = 0; k < n; ++k) mean[k] /= double(N);
      for (int64_t i = 0; i < N; ++i) {
        const T* row = from + i * stride + begin;
        T* out = to + i * D + begin;
        for (int64_t k = 0; k < n; ++k) out[k] = T(double(row[k]) - mean[k]);
      }
    }
  });
}

// Of the first N rows.
template <class T>
Centred<T> centre(const torch::stable::Tensor& all, int64_t N) {
  using torch::stable::Tensor;
  Tensor given = all;
  const Tensor embeddings = torch::stable::narrow(given, 0, 0, N);
  const int64_t D = embeddings.size(1);
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto copy = [&] {
    Tensor out = torch::stable::new_empty(embeddings, {N, D}, type);
    torch::stable::copy_(out, embeddings);
    return out;
  };
  const bool same = embeddings.scalar_type() == type;
  const bool rows = same && embeddings.stride(1) == 1;
  Tensor memory = same ? torch::stable::new_empty(embeddings, {N, D}, type) : copy();
  Tensor source = rows ? embeddings : same ? copy() : memory;
  T* x = static_cast<T*>(memory.mutable_data_ptr());
  const T* from = static_cast<const T*>(source.const_data_ptr());
  const int64_t stride = rows ? embeddings.stride(0) : D;
  centre_columns(from, stride, x, N, D);
  return {memory, source, x, N, D, from, stride};
}

}  // namespace fastkd
