// The angles op on the GPU: checks the contract, allocates, launches. Nothing here waits for the
// device. FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include <torch/csrc/stable/ops.h>

#include "common/embeddings_inputs.h"
#include "cuda/angles_launch.h"
#include "cuda/pairs.h"

#if defined(FASTKD_CUSIM)
// Rows of a block for the tests, a multiple of cuda::kAnglesTile; 0: as it is on a GPU.
extern "C" __attribute__((visibility("default"))) int fastkd_cusim_angles_block;
int fastkd_cusim_angles_block = 0;
#endif

namespace fastkd {
namespace {

template <class T>
void run_angle(const AnglesInputs& in, const Tensor& loss, const Tensor* grad, const cuda::Context& context) {
  cuda::AnglesParams<T> P{};
  P.student = embeddings(in.student, "student");
  P.teacher = embeddings(in.teacher, "teacher");
  P.N = in.N();
  P.count = in.count_data();
  P.delta = in.angle_delta;
  P.weight = in.angle_weight;
  P.block = cuda::kAnglesBlock<T>;
#if defined(FASTKD_CUSIM)
  if (fastkd_cusim_angles_block > 0) P.block = fastkd_cusim_angles_block;
#endif
  P.loss = static_cast<T*>(loss.mutable_data_ptr());
  if (grad) P.grad = static_cast<T*>(grad->mutable_data_ptr());
  const int64_t bytes = cuda::angles_workspace_bytes(P, context.device);
  const Tensor workspace = torch::stable::new_empty(in.student, {bytes}, ScalarType::Byte);
  FASTKD_CUDA_CHECK(cuda::angles_forward(P, context.device, workspace.mutable_data_ptr(), context.stream));
}

void angles_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const AnglesInputs in{{AnglesCall::read(arguments)}};
  FASTKD_CHECK(cuda::lies_with(in.teacher, in.student), "teacher: a tensor on the student's device wanted");
  check(in);
  FASTKD_CHECK(!in.count || cuda::lies_with(*in.count, in.student), "count: a tensor on the student's device wanted");
  const Tensor loss = in.new_loss();
  Tensor grad = in.new_grad(in.save);
  const cuda::Context context(in.student);
  // both parts are added in the compute type
  const bool convert = in.save && in.grad_type() != in.compute();
  const Tensor sum = convert ? torch::stable::new_empty(in.student, {in.N(), in.student.size(1)}, in.compute()) : grad;
  const Tensor* wanted = in.save ? &sum : nullptr;
  if (in.angle_weight != 0 && in.N() > 0) {
    dispatch_compute(in.compute(), [&](auto t) { run_angle<decltype(t)>(in, loss, wanted, context); });
  } else {
    torch::stable::fill_(loss, 0);
    if (wanted) torch::stable::fill_(sum, 0);
  }
  if (in.distance_weight != 0) {
    cuda::pairs_accumulate(in.student, in.teacher, in.distance_delta, in.distance_weight, in.count_data(), loss, wanted,
                           context);
  }
  if (convert) torch::stable::copy_(grad, sum);
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

}  // namespace
}  // namespace fastkd

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("angles_fwd", &fastkd::angles_fwd);
}
