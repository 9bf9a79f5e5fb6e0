// The op of adaptive_kl_div's weights on the GPU: a launch. Nothing here waits for the device.
// FASTKD_CUSIM: the same over host memory, for the tests.
#include "common/head_inputs.h"
#include "cuda/context.h"
#include "cuda/head_launch.h"

namespace fastkd {
namespace {

struct Cuda {
  explicit Cuda(const Tensor& student) : context(student) {}
  static constexpr const char* kName = "on the student's device";
  static constexpr bool kValuesAtHand = false;
  static bool lies_with(const Tensor& x, const Tensor& student) { return cuda::lies_with(x, student); }

  template <class T>
  void head(const RowsParams<T>& P, double* weight) const {
    FASTKD_CUDA_CHECK(cuda::head_weight<T>(P, context.device, weight, context.stream));
  }

 private:
  const cuda::Context context;
};

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("head_weight", &head_weight<Cuda>);
}

}  // namespace fastkd
