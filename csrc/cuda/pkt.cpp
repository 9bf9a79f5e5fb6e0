// The op of a strip of cosines on the GPU: checks the contract, allocates, launches. Nothing here waits for the
// device. FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/pkt_inputs.h"
#include "cuda/context.h"
#include "cuda/pkt_launch.h"

namespace fastkd {
namespace {

template <class T>
void run(const PktStripCall& in, const Tensor& loss, const cuda::Context& context) {
  const auto data = [&in](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()) + in.row; };
  cuda::PktParams<T> P{};
  P.student = static_cast<T*>(in.student.mutable_data_ptr());
  P.teacher = static_cast<const T*>(in.teacher.const_data_ptr());
  P.rows = in.student.size(0);
  P.columns = in.student.size(1);
  P.valid = data(in.valid);
  P.student_inverse = data(in.student_inverse);
  P.teacher_inverse = data(in.teacher_inverse);
  P.weight = data(in.weight);
  P.scale = data(in.scale);
  P.eps = T(in.eps);
  P.slopes = static_cast<double*>(in.slopes.mutable_data_ptr()) + in.row;
  P.loss = static_cast<double*>(loss.mutable_data_ptr());
  const Tensor workspace = torch::stable::new_empty(in.slopes, {cuda::pkt_plan(P, nullptr)});
  cuda::pkt_plan(P, static_cast<double*>(workspace.mutable_data_ptr()));
  FASTKD_CUDA_CHECK(cuda::pkt_strip(P, context.stream));
}

void pkt_strip_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = PktStripCall::read(arguments);
  for (const Tensor* x :
       {&in.teacher, &in.slopes, &in.valid, &in.student_inverse, &in.teacher_inverse, &in.weight, &in.scale}) {
    FASTKD_CHECK(cuda::lies_with(*x, in.student), "all of a strip: tensors on the student's device wanted");
  }
  check(in);
  const cuda::Context context(in.student);
  const Tensor loss = torch::stable::new_empty(in.slopes, {});
  dispatch_compute(in.student.scalar_type(), [&](auto zero) { run<decltype(zero)>(in, loss, context); });
  stack[0] = torch::stable::detail::from(loss);
}

}  // namespace
}  // namespace fastkd

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("pkt_strip_", &fastkd::pkt_strip_);
}
