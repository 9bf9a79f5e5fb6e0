// Rows of logits of the programs for the sanitizers.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "common/rows_params.h"

namespace fastkd {

// Memory that begins 16-byte aligned and ends where its last byte does: reading past it is seen. [N / inner, V, inner].
template <class S>
struct Matrix {
  Matrix(int64_t N, int64_t V, int64_t inner)
      : N(N), V(V), inner(inner), data(static_cast<S*>(aligned_alloc(16, (N * V * sizeof(S) + 15) / 16 * 16))) {}
  ~Matrix() { free(data); }
  Matrix(const Matrix&) = delete;
  RowsTensor rows(DType type) const {
    RowsTensor r{};
    r.data = reinterpret_cast<char*>(data);
    r.dtype = type;
    r.element_size = sizeof(S);
    r.dims = inner > 1 ? 2 : 1;
    r.size[0] = N / inner;
    r.stride[0] = V * inner;
    r.size[1] = inner;
    r.stride[1] = 1;
    r.stride_v = inner;
    return r;
  }
  S& at(int64_t n, int64_t v) const { return data[n / inner * V * inner + v * inner + n % inner]; }
  int64_t N, V, inner;
  S* data;
};

}  // namespace fastkd
