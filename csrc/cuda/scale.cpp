// x *= factor on the GPU, for all x in one launch of as many as its parameters hold. FASTKD_CUSIM: the
// same over host memory, for the tests, in a namespace of its own.
#include "common/layout.h"
#include "common/scale_inputs.h"
#include "cuda/context.h"

namespace fastkd {
namespace {

using cuda::Context;
using cuda::lies_with;

void scale_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = ScaleCall::read(arguments);
  check(in);
  for (const Tensor& x : in.x)
    FASTKD_CHECK(lies_with(in.factor, x) && lies_with(x, x), "x: tensors on the device of factor wanted");
  const Context context(in.factor);
  dispatch_compute(in.factor.scalar_type(), [&](auto t) {
    using T = decltype(t);
    cuda::Scale<T> S{};
    S.factor = static_cast<const T*>(in.factor.const_data_ptr());
    const auto launch = [&] {
      if (S.count > 0) FASTKD_CUDA_CHECK(cuda::scale(S, context.device, context.stream));
      S.count = 0;
    };
    for (const Tensor& x : in.x) {
      if (x.numel() == 0) continue;
      if (!same_dense_layout(x, x)) {
        multiply(x, in.factor);
        continue;
      }
      const int32_t size = int32_t(x.element_size());
      S.parts[S.count++] = {static_cast<char*>(x.mutable_data_ptr()), x.numel(), to_dtype(x.scalar_type(), "x"), size};
      if (S.count == cuda::kScaleParts) launch();
    }
    launch();
  });
}

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("scale_", &scale_);
}

}  // namespace fastkd
