// The ops that standardize logits on the GPU: launches. Nothing here waits for the device.
// FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/standardize_op.h"
#include "cuda/context.h"
#include "cuda/standardize_launch.h"

namespace fastkd {
namespace {

struct Cuda {
  explicit Cuda(const Tensor& x) : context(x) {}
  static constexpr const char* kName = "on the device of x";
  static bool lies_with(const Tensor& x, const Tensor& like) { return cuda::lies_with(x, like); }

  template <class T>
  void run(const StandardizeParams<T>& P, bool backward) const {
    FASTKD_CUDA_CHECK(cuda::standardize(P, backward, context.stream));
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
  m.impl("standardize_fwd", &StandardizeOps<Cuda>::forward);
  m.impl("standardize_bwd", &StandardizeOps<Cuda>::backward);
}

}  // namespace fastkd
