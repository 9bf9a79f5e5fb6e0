// x *= factor on the CPU.
#include "common/scale_inputs.h"

namespace fastkd {
namespace {

bool is_one(const Tensor& factor) {
  return factor.scalar_type() == ScalarType::Double ? *static_cast<const double*>(factor.const_data_ptr()) == 1
                                                    : *static_cast<const float*>(factor.const_data_ptr()) == 1;
}

void scale_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = ScaleCall::read(arguments);
  check(in);
  FASTKD_CHECK(in.factor.is_cpu(), "factor: a CPU tensor wanted");
  if (is_one(in.factor)) return;
  for (const Tensor& x : in.x) multiply(x, in.factor);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("scale_", &scale_); }

}  // namespace fastkd
