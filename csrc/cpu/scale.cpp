// x *= factor on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/dispatch.h"

namespace fastkd {
namespace {

using torch::stable::Tensor;

bool is_one(const Tensor& factor) {
  return factor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(factor.const_data_ptr()) == 1
                                                    : *static_cast<const float*>(factor.const_data_ptr()) == 1;
}

void scale_(StableIValue* stack, uint64_t, uint64_t) {
  const auto x = torch::stable::detail::to<Tensor>(stack[0]), factor = torch::stable::detail::to<Tensor>(stack[1]);
  FASTKD_CHECK(factor.numel() == 1 && factor.is_cpu() &&
                   (factor.scalar_type() == ScalarType::Float || factor.scalar_type() == ScalarType::Double),
               "factor: one element of float32 or float64 on the CPU wanted");
  if (is_one(factor)) return;
  StableIValue arguments[2] = {torch::stable::detail::from(x), torch::stable::detail::from(factor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", arguments, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(arguments[0]);  // the result is x once more: takes its reference back
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("scale_", &scale_); }

}  // namespace fastkd
