// What the features ops are given, on every device: read off the dispatcher's stack, and checked.
#pragma once
#include <optional>
#include <utility>
#include <vector>

#include "calls.h"
#include "common/features_params.h"
#include "common/layout.h"
#include "common/numbers.h"
#include "common/rows_tensor.h"

namespace fastkd {

struct FeaturesInputs {
  explicit FeaturesInputs(LayersCall call)
      : student(std::move(call.student)),
        teacher(std::move(call.teacher)),
        feature_dim(std::move(call.feature_dim)),
        feature(call.feature),
        mask(std::move(call.mask)),
        weight(std::move(call.weight)),
        reduction(call.reduction),
        layer_weights(numbers(call.layer_weights, int64_t(student.size()), "layer_weights")),
        beta(optional(call.beta)) {}
  explicit FeaturesInputs(const OneLayerCall& call)
      : student{call.student},
        teacher{call.teacher},
        feature_dim{call.feature_dim},
        feature(call.feature),
        mask(listed(call.mask)),
        weight(listed(call.weight)),
        reduction(call.reduction),
        layer_weights{1.0},
        beta(optional(call.beta)) {}
  static std::vector<Tensor> listed(const OptionalTensor& x) {
    return x ? std::vector<Tensor>{*x} : std::vector<Tensor>{};
  }

  static std::optional<double> optional(const OptionalTensor& x) {
    return x ? std::optional<double>(number(*x, "beta")) : std::nullopt;
  }

  std::vector<Tensor> student, teacher;
  std::vector<int64_t> feature_dim;
  int64_t feature;
  std::vector<Tensor> mask, weight;
  int64_t reduction;
  std::vector<double> layer_weights;
  std::optional<double> beta;

  size_t layers() const { return student.size(); }
  int64_t D(size_t l) const { return student[l].size(feature_dim[l]); }
  int64_t N(size_t l) const { return student[l].numel() / D(l); }
  int64_t rows() const {
    int64_t n = 0;
    for (size_t l = 0; l < layers(); ++l) n += N(l);
    return n;
  }
  // Of all layers: they add up to one loss.
  ScalarType compute() const {
    ScalarType type = ScalarType::Float;
    for (size_t l = 0; l < layers(); ++l) {
      if (compute_type(student[l].scalar_type(), teacher[l].scalar_type()) == ScalarType::Double) {
        type = ScalarType::Double;
      }
    }
    return type;
  }
};

inline void check(const FeaturesInputs& in) {
  const size_t L = in.layers();
  FASTKD_CHECK(L > 0 && in.teacher.size() == L && in.feature_dim.size() == L && in.layer_weights.size() == L,
               "student and teacher: as many tensors of each wanted, and at least one");
  FASTKD_CHECK(in.mask.empty() || in.mask.size() == L, "mask: one for each layer wanted, or none");
  FASTKD_CHECK(in.weight.empty() || in.weight.size() == L, "weight: one for each layer wanted, or none");
  FASTKD_CHECK(in.feature >= 0 && in.feature < int64_t(Feature::kCount), "feature: unknown number ", in.feature);
  FASTKD_CHECK(in.reduction >= 0 && in.reduction <= int64_t(Reduction::kMean), "reduction: unknown number ",
               in.reduction);
  if (in.beta) {
    FASTKD_CHECK(*in.beta >= 0 && std::isfinite(*in.beta), "beta: a finite number of at least 0 wanted, got ",
                 *in.beta);
    FASTKD_CHECK(Feature(in.feature) != Feature::kCosine, "beta: none wanted of cosines, got ", *in.beta);
  }
  for (size_t l = 0; l < L; ++l) {
    const Tensor &s = in.student[l], &t = in.teacher[l];
    FASTKD_CHECK(s.dim() == t.dim() && in.feature_dim[l] >= 0 && in.feature_dim[l] < s.dim(),
                 "student and teacher: the same shape wanted in layer ", l);
    for (int64_t d = 0; d < s.dim(); ++d) {
      FASTKD_CHECK(s.size(d) == t.size(d), "student and teacher: the same shape wanted in layer ", l);
    }
    FASTKD_CHECK(in.D(l) > 0, "student: at least one feature wanted in layer ", l);
    to_dtype(s.scalar_type(), "student");
    to_dtype(t.scalar_type(), "teacher");
    FASTKD_CHECK(in.layer_weights[l] >= 0 && std::isfinite(in.layer_weights[l]),
                 "layer_weights: finite numbers of at least 0 wanted, got ", in.layer_weights[l]);
  }
}

// A tensor as one row of rows of D elements, as it lies in memory.
inline RowsTensor flat_tensor(const Tensor& x, void* data, const char* name, int64_t N, int64_t D) {
  RowsTensor r{};
  r.data = static_cast<char*>(data);
  r.dtype = to_dtype(x.scalar_type(), name);
  r.element_size = int32_t(x.element_size());
  r.dims = 1;
  r.size[0] = N;
  r.stride[0] = D;
  r.stride_v = 1;
  return r;
}

inline FeaturesLayer features_layer(const FeaturesInputs& in, size_t l, const Tensor* grad) {
  FeaturesLayer layer{};
  const Tensor &s = in.student[l], &t = in.teacher[l];
  layer.numel = s.numel();
  layer.layer_weight = in.layer_weights[l];
  const bool rows_matter = normalized(Feature(in.feature)) || !in.mask.empty() || !in.weight.empty() ||
                           Reduction(in.reduction) == Reduction::kNone;
  layer.flat = !rows_matter && same_dense_layout(s, t) && (!grad || same_dense_layout(s, *grad));
  layer.D = layer.flat ? kFlatRow : in.D(l);
  layer.N = layer.flat ? (layer.numel + kFlatRow - 1) / kFlatRow : in.N(l);
  const auto view = [&](const Tensor& x, void* data, const char* name) {
    return layer.flat ? flat_tensor(x, data, name, layer.N, layer.D) : rows_tensor(x, data, name, in.feature_dim[l]);
  };
  layer.student = view(s, const_cast<void*>(s.const_data_ptr()), "student");
  layer.teacher = view(t, const_cast<void*>(t.const_data_ptr()), "teacher");
  if (grad) layer.grad = view(*grad, grad->mutable_data_ptr(), "grad");
  return layer;
}

}  // namespace fastkd
