// How tensors lie in memory.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace fastkd {

// Whether both lie in memory in the same way, without gaps.
inline bool same_dense_layout(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  std::vector<std::pair<int64_t, int64_t>> steps;  // stride and size
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) == 1) continue;
    if (a.stride(d) != b.stride(d)) return false;
    steps.emplace_back(a.stride(d), a.size(d));
  }
  std::sort(steps.begin(), steps.end());
  int64_t next = 1;
  for (const auto& [stride, size] : steps) {
    if (stride != next) return false;
    next *= size;
  }
  return true;
}

}  // namespace fastkd
