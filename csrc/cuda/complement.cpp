// The ops of what is beside K classes of a row on the GPU: launches. Nothing here waits for the device.
// FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/complement_op.h"
#include "cuda/complement_launch.h"
#include "cuda/context.h"

namespace fastkd {
namespace {

struct Cuda {
  explicit Cuda(const Tensor& x) : context(x) {}
  static constexpr const char* kName = "on the student's device";
  static constexpr bool kValuesAtHand = false;
  static bool lies_with(const Tensor& x, const Tensor& like) { return cuda::lies_with(x, like); }

  template <class T>
  void complement(const ComplementParams<T>& P, bool backward) const {
    FASTKD_CUDA_CHECK(cuda::complement(P, backward, context.stream));
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
  m.impl("complement_fwd", &ComplementOps<Cuda>::forward);
  m.impl("complement_bwd", &ComplementOps<Cuda>::backward);
}

}  // namespace fastkd
