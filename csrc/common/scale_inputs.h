// What scale_ is given, on every device, checked.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "calls.h"
#include "common/rows_tensor.h"

namespace fastkd {

inline void check(const ScaleCall& in) {
  FASTKD_CHECK(in.factor.numel() == 1 &&
                   (in.factor.scalar_type() == ScalarType::Float || in.factor.scalar_type() == ScalarType::Double),
               "factor: one element of float32 or float64 wanted");
}

// x *= factor, by torch.
inline void multiply(const Tensor& x, const Tensor& factor) {
  StableIValue arguments[2] = {torch::stable::detail::from(x), torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", arguments, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(arguments[0]);  // the result is x once more: takes its reference back
}

}  // namespace fastkd
