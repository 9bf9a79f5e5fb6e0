// The pairs ops on the GPU: checks the contract, allocates, launches. Nothing here waits for the
// device. FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "cuda/pairs.h"

#include "common/embeddings_inputs.h"
#include "common/enum.h"
#include "cuda/pairs_launch.h"

namespace fastkd {
namespace {

cudaError_t run_relation(Relation relation, cuda::PairsStorage storage, const cuda::PairsParams& P,
                         const cuda::Context& context) {
  return with_constant(relation, [&](auto r) {
    return with_constant(storage,
                         [&](auto s) { return cuda::pairs_run<s.value, r.value>(P, context.device, context.stream); });
  });
}

// P: what does not follow from the tensors. N = 0 and N = 1 have no pairs: nothing is added to a sum that
// is accumulated.
void run(cuda::PairsParams P, Relation relation, const Tensor& student, const Tensor& teacher, const Tensor& loss,
         const Tensor* grad, const cuda::Context& context) {
  if (P.options.N < 2) {
    if (P.accumulate) return;
    torch::stable::fill_(loss, 0);
    if (grad) torch::stable::fill_(*grad, 0);
    return;
  }
  P.student.source = embeddings(student, "student");
  P.teacher.source = embeddings(teacher, "teacher");
  P.loss = loss.mutable_data_ptr();
  if (grad) {
    P.grad = grad->mutable_data_ptr();
    P.grad_dtype = to_dtype(grad->scalar_type(), "grad");
    P.grad_element_size = int32_t(grad->element_size());
  }
  const cuda::PairsStorage storage = cuda::pairs_storage(P.student.source.dtype, P.teacher.source.dtype);
  const int64_t bytes = cuda::pairs_plan(P, storage, context.device, nullptr);
  const Tensor workspace = torch::stable::new_empty(student, {bytes}, ScalarType::Byte);
  cuda::pairs_plan(P, storage, context.device, static_cast<char*>(workspace.mutable_data_ptr()));
  FASTKD_CUDA_CHECK(run_relation(relation, storage, P, context));
}

void pairs_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const PairsInputs in{{PairsCall::read(arguments)}};
  FASTKD_CHECK(cuda::lies_with(in.teacher, in.student), "teacher: a tensor on the student's device wanted");
  check(in);
  FASTKD_CHECK(!in.count || cuda::lies_with(*in.count, in.student), "count: a tensor on the student's device wanted");
  FASTKD_CHECK(!in.weight || cuda::lies_with(*in.weight, in.student),
               "weight: a tensor on the student's device wanted");
  const Tensor loss = in.new_loss(), grad = in.new_grad(in.save);
  cuda::PairsParams P{};
  P.options = {in.delta, in.normalize, in.N()};
  P.weight = 1;
  P.count = in.count_data();
  if (in.weight) P.row_weights = in.weight->const_data_ptr();
  const cuda::Context context(in.student);
  run(P, Relation(in.relation), in.student, in.teacher, loss, in.save ? &grad : nullptr, context);
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

}  // namespace

void cuda::pairs_accumulate(const Tensor& student, const Tensor& teacher, double delta, double weight,
                            const int64_t* count, const Tensor& loss, const Tensor* grad, const Context& context) {
  PairsParams P{};
  P.options = {delta, true, student.size(0)};
  P.weight = weight;
  P.count = count;
  P.accumulate = true;
  run(P, Relation::kRkdDistance, student, teacher, loss, grad, context);
}

}  // namespace fastkd

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(FASTKD_NAMESPACE, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(FASTKD_NAMESPACE, CUDA, m) {
#endif
  m.impl("pairs_fwd", &fastkd::pairs_fwd);
}
