// The op of a strip of triplets on the GPU: checks the contract, allocates, launches. Nothing here waits for the
// device: what lists of positives hold is not looked at. FASTKD_CUSIM: the same over host memory, for the tests, in
// a namespace of its own.
#include "common/triplet_inputs.h"
#include "cuda/context.h"
#include "cuda/triplet_launch.h"

namespace fastkd {
namespace {

template <class T>
void run(const TripletStripCall& in, const Tensor& sums, const cuda::Context& context) {
  const auto data = [](const Tensor& x, auto zero) { return static_cast<const decltype(zero)*>(x.const_data_ptr()); };
  cuda::TripletParams<T> P{};
  P.strip = static_cast<T*>(in.strip.mutable_data_ptr());
  P.rows = int32_t(in.strip.size(0));
  P.row = int32_t(in.row);
  P.N = int32_t(in.strip.size(1));
  P.D = int32_t(in.x.size(1));
  P.x = data(in.x, T());
  P.norms = data(in.norms, T());
  P.positives = data(in.positives, int64_t());
  P.first = data(in.first, int64_t());
  P.last = data(in.last, int64_t());
  P.length = in.positives.size(0);
  P.valid = data(in.valid, bool());
  P.count = data(in.count, int64_t());
  P.weight = data(in.weight, T());
  P.margin = T(in.margin);
  P.grad = in.grad ? static_cast<T*>(in.grad->mutable_data_ptr()) : nullptr;
  P.sums = static_cast<double*>(sums.mutable_data_ptr());
  const Tensor workspace = torch::stable::new_empty(in.strip, {cuda::triplet_plan(P, nullptr)}, ScalarType::Byte);
  cuda::triplet_plan(P, static_cast<char*>(workspace.mutable_data_ptr()));
  FASTKD_CUDA_CHECK(cuda::triplet_strip(P, context.stream));
}

void triplet_strip_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = TripletStripCall::read(arguments);
  for (const Tensor* x : {&in.strip, &in.x, &in.norms, &in.positives, &in.first, &in.last, &in.valid, &in.count,
                          &in.weight, in.grad ? &*in.grad : &in.strip}) {
    FASTKD_CHECK(cuda::lies_with(*x, in.strip), "all of a strip: tensors on one GPU wanted");
  }
  check(in);
  FASTKD_CHECK(in.x.size(0) <= cuda::kTripletMost && in.x.size(1) <= cuda::kTripletMost, "x: at most ",
               cuda::kTripletMost, " samples and features wanted");
  const cuda::Context context(in.strip);
  const Tensor sums = torch::stable::new_empty(in.strip, {3}, ScalarType::Double);
  dispatch_compute(in.strip.scalar_type(), [&](auto zero) { run<decltype(zero)>(in, sums, context); });
  stack[0] = torch::stable::detail::from(sums);
}

}  // namespace
}  // namespace fastkd

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("triplet_strip_", &fastkd::triplet_strip_);
}
