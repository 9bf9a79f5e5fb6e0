// Tensors as rows of features, for the kernels of the features schedule.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <utility>
#include <vector>

#include "common/check.h"
#include "cuda/features_launch.h"

namespace fastkd::cuda {

// Without its leading dimensions.
inline FeaturesTensor features_tensor(const RowsTensor& x) {
  FeaturesTensor r{};
  r.data = x.data;
  r.step = x.stride_v * x.element_size;
  r.dtype = x.dtype;
  r.element_size = x.element_size;
  return r;
}

// The leading dimensions, in bytes; those that lie one after the other in memory, in all tensors, are one.
// tensors: all of one shape, where they are not null, and what they are in the layer.
template <class T>
void set_leading(FeaturesPart<T>& layer, std::vector<std::pair<const torch::stable::Tensor*, FeaturesTensor*>> tensors,
                 int64_t feature_dim) {
  std::erase_if(tensors, [](const auto& x) { return x.first == nullptr; });
  const auto bytes = [](const auto& x, int64_t d) { return x.first->stride(d) * x.second->element_size; };
  const torch::stable::Tensor& student = *tensors[0].first;
  for (int64_t d = 0; d < student.dim(); ++d) {
    const int64_t size = student.size(d);
    if (d == feature_dim || size == 1) continue;
    bool merge = layer.dims > 0;
    for (const auto& x : tensors) merge = merge && x.second->stride[layer.dims - 1] == size * bytes(x, d);
    FASTKD_CHECK(merge || layer.dims < kFeaturesDims, "student and teacher: more than ", kFeaturesDims,
                 " separate leading dimensions");
    if (!merge) layer.size[layer.dims++] = 1;
    layer.size[layer.dims - 1] *= size;
    for (const auto& x : tensors) x.second->stride[layer.dims - 1] = bytes(x, d);
  }
  for (int d = 0; d < layer.dims; ++d) layer.inverse_size[d] = 1 / double(layer.size[d]);
}

}  // namespace fastkd::cuda
