// The rows ops on the GPU: launches. Nothing here waits for the device.
// FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/enum.h"
#include "common/rows_op.h"
#include "cuda/context.h"
#include "cuda/rows_launch.h"
#include "cuda/rows_plan.h"

namespace fastkd {
namespace {

using cuda::Context;

struct Cuda {
  explicit Cuda(const Tensor& student) : student(student), context(student) {}
  static constexpr const char* kName = "on the student's device";
  static constexpr bool kValuesAtHand = false;
  static bool lies_with(const Tensor& x, const Tensor& student) { return cuda::lies_with(x, student); }

  template <class T>
  void forward(RowsParams<T>& P, const Tensor& loss, bool per_row) const {
    const Tensor rows = per_row ? loss : torch::stable::new_empty(student, {P.N}, kScalarType<T>);
    P.loss = static_cast<T*>(rows.mutable_data_ptr());
    if (P.N > 0) {
      if (P.parts) FASTKD_CUDA_CHECK(cuda::rows_parts(P, context.stream));
      const cuda::RowsPlan plan = cuda::rows_plan(P, context.device);
      const int64_t parts = plan.on_chip ? 0 : P.N * plan.splits;
      const Tensor workspace = torch::stable::new_empty(student, {parts * cuda::kPartValues}, kScalarType<T>);
      FASTKD_CUDA_CHECK(with_constant(P.divergence, [&](auto which) {
        return cuda::rows_forward<which.value>(P, context.device, workspace.mutable_data_ptr(), context.stream);
      }));
    }
    if (per_row) return;
    FASTKD_CUDA_CHECK(cuda::rows_sum<T>(P.loss, P.N, P.grad_scale, P.scale, static_cast<T*>(loss.mutable_data_ptr()),
                                        context.stream));
  }

  template <class T>
  void backward(RowsParams<T>& P) const {
    FASTKD_CUDA_CHECK(with_constant(
        P.divergence, [&](auto which) { return cuda::rows_backward<which.value>(P, context.device, context.stream); }));
  }

  template <class T>
  void statistics(RowsParams<T>& P) const {
    const Tensor workspace = phase_workspace(P);
    FASTKD_CUDA_CHECK(cuda::rows_statistics(P, context.device, workspace.mutable_data_ptr(), context.stream));
  }

  template <class T>
  void sums(RowsParams<T>& P) const {
    const Tensor workspace = phase_workspace(P);
    FASTKD_CUDA_CHECK(with_constant(P.divergence, [&](auto which) {
      return cuda::rows_sums<which.value>(P, context.device, workspace.mutable_data_ptr(), context.stream);
    }));
  }

  template <class T>
  static void inverse_divisor(const InverseDivisor& in) {
    const Context context(in.scale);
    const bool* mask = in.mask ? static_cast<const bool*>(in.mask->const_data_ptr()) : nullptr;
    const void* normalizer = in.normalizer ? in.normalizer->const_data_ptr() : nullptr;
    double* scale = static_cast<double*>(in.scale.mutable_data_ptr());
    FASTKD_CUDA_CHECK(cuda::rows_scale<T>({mask, in.rows, normalizer, double(in.each), true, scale}, context.stream));
  }

 private:
  template <class T>
  Tensor phase_workspace(const RowsParams<T>& P) const {
    const int64_t parts = P.N * cuda::rows_phase_plan(P, context.device).splits;
    return torch::stable::new_empty(student, {parts * cuda::kPartValues}, kScalarType<T>);
  }

  const Tensor& student;
  const Context context;
};

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("rows_fwd", &RowsOps<Cuda>::forward);
  m.impl("rows_bwd", &RowsOps<Cuda>::backward);
  m.impl("rows_statistics", &RowsOps<Cuda>::statistics);
  m.impl("rows_sums", &RowsOps<Cuda>::sums);
  m.impl("inverse_divisor", &RowsOps<Cuda>::inverse_divisor);
}

}  // namespace fastkd
