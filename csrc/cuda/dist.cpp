// The dist ops on the GPU: launches. Nothing here waits for the device.
// FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/dist_op.h"
#include "cuda/context.h"
#include "cuda/dist_launch.h"

namespace fastkd {
namespace {

using cuda::Context;

struct Cuda {
  explicit Cuda(const Tensor& student) : student(student), context(student) {}
  static constexpr const char* kName = "on the student's device";
  static constexpr bool kValuesAtHand = false;
  static bool lies_with(const Tensor& x, const Tensor& student) { return cuda::lies_with(x, student); }

  template <class T>
  void dist_forward(const DistParams<T>& P, T* loss) const {
    const int64_t N = P.rows.N, V = P.rows.V;
    const int64_t chunks = N > 0 && P.intra_weight != 0 ? cuda::dist_chunks(N, V) : 0;
    constexpr int64_t kMoments = sizeof(ColumnMoments) / sizeof(double);
    const Tensor memory = torch::stable::new_empty(student, {N + V + kMoments * chunks * V}, ScalarType::Double);
    double* at = static_cast<double*>(memory.mutable_data_ptr());
    const cuda::DistWorkspace workspace{at, at + N, reinterpret_cast<ColumnMoments*>(at + N + V), chunks};
    FASTKD_CUDA_CHECK(cuda::dist_forward(P, workspace, loss, context.stream));
  }
  template <class T>
  void dist_backward(const DistParams<T>& P, const Tensor&) const {
    FASTKD_CUDA_CHECK(cuda::dist_backward(P, context.stream));
  }

 private:
  const Tensor& student;
  const Context context;
};

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("dist_fwd", &DistOps<Cuda>::forward);
  m.impl("dist_bwd", &DistOps<Cuda>::backward);
}

}  // namespace fastkd
