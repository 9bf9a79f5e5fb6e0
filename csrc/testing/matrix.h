// Rows of logits of the programs for the sanitizers, and numbers to fill them with.
#pragma once
#include "common/rows_params.h"
#include "testing/memory.h"

namespace fastkd {

// [N / inner, V, inner], in memory of its own: see Memory.
template <class S>
struct Matrix {
  Matrix(int64_t N, int64_t V, int64_t inner = 1)
      : N(N), V(V), inner(inner), memory(N * V * int64_t(sizeof(S))), data(memory.as<S>()) {}
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
  Memory memory;
  S* data;
};

// From -2 to 2. The standard library's generators are templates, which the linker would share with cusim's.
inline float number(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return float(state >> 40) / float(1 << 22) - 2;
}

}  // namespace fastkd
