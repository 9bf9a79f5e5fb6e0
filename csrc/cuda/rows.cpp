// The rows ops on the GPU: checks the contract, allocates, launches. Nothing here waits for the
// device. FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/check.h"
#include "common/rows_inputs.h"
#include "cuda/context.h"
#include "cuda/rows_launch.h"
#include "cuda/rows_plan.h"
#include "math/jensen_shannon_series.h"

namespace fastkd {
namespace {

using cuda::Context;
using cuda::lies_with;

template <class T>
const T* optional_data(const OptionalTensor& x, const RowsInputs& in, int64_t numel, ScalarType type,
                       const char* name) {
  if (!x) return nullptr;
  FASTKD_CHECK(lies_with(*x, in.student) && x->scalar_type() == type && x->numel() == numel && x->is_contiguous(), name,
               ": a contiguous tensor on the student's device with one element of the right dtype per row wanted");
  return static_cast<const T*>(x->const_data_ptr());
}

void check_all(const RowsInputs& in) {
  FASTKD_CHECK(lies_with(in.teacher, in.student), "teacher: a tensor on the student's device wanted");
  check(in);
}

Tensor empty_like_rows(const RowsInputs& in, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(in.student, shape, type);
}

// The params of a call, and the memory that they point to.
template <class T>
struct Call {
  Call(const RowsInputs& in, void* grad, const Tensor& grad_like, const Context& context) : context(context) {
    const ScalarType type = in.compute();
    P.divergence = Divergence(in.divergence);
    P.parameter = divergence_parameter<T>(P.divergence, in.parameter);
    P.N = in.N();
    P.V = in.V();
    P.student = rows_tensor(in.student, const_cast<void*>(in.student.const_data_ptr()), "student");
    P.teacher = rows_tensor(in.teacher, const_cast<void*>(in.teacher.const_data_ptr()), "teacher");
    if (grad) P.grad = rows_tensor(grad_like, grad, "grad");
    P.temperature = optional_data<T>(in.temperature_rows, in, P.N, type, "temperature");
    P.teacher_temperature = optional_data<T>(in.teacher_temperature_rows, in, P.N, type, "teacher_temperature");
    P.temperature_all = in.temperature;
    P.teacher_temperature_all = in.teacher_temperature;
    P.t_squared = in.t_squared;
    P.mask = optional_data<bool>(in.mask, in, P.N, ScalarType::Bool, "mask");
    P.weight = optional_data<T>(in.weight, in, P.N, type, "weight");
    set_scale(in);
  }

  RowsParams<T> P{};

 private:
  // 1 / divisor: by the host where it knows the number of rows, else by the device.
  void set_scale(const RowsInputs& in) {
    const Reduction reduction = Reduction(in.reduction);
    const bool per_row = reduction == Reduction::kBatchMean || reduction == Reduction::kMean;
    double divisor = reduction == Reduction::kMean ? double(in.V()) : 1.0;
    if (in.normalizer) divisor = *in.normalizer;
    const void* normalizer = optional_data<T>(in.normalizer_tensor, in, 1, in.compute(), "normalizer");
    const bool multiply = per_row && !in.normalizer;
    P.grad_scale = P.N == 0 ? 0 : 1.0 / (divisor * (multiply ? double(P.N) : 1.0));
    if (reduction == Reduction::kNone || P.N == 0 || (!P.mask && !normalizer)) return;
    scale_ = empty_like_rows(in, {}, ScalarType::Double);
    double* scale = static_cast<double*>(scale_->mutable_data_ptr());
    FASTKD_CUDA_CHECK(cuda::rows_scale<T>({P.mask, P.N, normalizer, divisor, multiply, scale}, context.stream));
    P.scale = scale;
  }

  const Context& context;
  OptionalTensor scale_;
};

// f(std::integral_constant<Divergence, ...>)
template <class F>
auto with_divergence(Divergence which, F&& f) {
#define FASTKD_CASE(name)   \
  case Divergence::k##name: \
    return f(std::integral_constant<Divergence, Divergence::k##name>());
  switch (which) {
    FASTKD_FOR_EACH_DIVERGENCE(FASTKD_CASE)
    case Divergence::kCount:
      break;
  }
#undef FASTKD_CASE
  __builtin_unreachable();  // check() has looked
}

template <class T>
Tensor run_forward(const RowsInputs& in, void* grad, const Tensor& grad_like, RowsStats* stats) {
  const bool scalar = Reduction(in.reduction) != Reduction::kNone;
  const ScalarType type = in.compute();
  const Tensor loss = empty_like_rows(in, scalar ? std::vector<int64_t>{} : in.leading(), type);
  const Context context(in.student);
  Call<T> call(in, grad, grad_like, context);
  RowsParams<T>& P = call.P;
  P.stats = stats;
  const Tensor rows = scalar ? empty_like_rows(in, {P.N}, type) : loss;
  P.loss = static_cast<T*>(rows.mutable_data_ptr());
  if (P.N > 0) {
    const cuda::RowsPlan plan = cuda::rows_plan(P, context.device);
    const int64_t parts = plan.on_chip ? 0 : P.N * plan.splits;
    const Tensor workspace = empty_like_rows(in, {parts * 7}, type);  // Sums and LossSums
    FASTKD_CUDA_CHECK(with_divergence(P.divergence, [&](auto which) {
      return cuda::rows_forward<which.value>(P, context.device, workspace.mutable_data_ptr(), context.stream);
    }));
  }
  if (scalar) {
    FASTKD_CUDA_CHECK(cuda::rows_sum<T>(P.loss, P.N, P.grad_scale, P.scale, static_cast<T*>(loss.mutable_data_ptr()),
                                        context.stream));
  }
  return loss;
}

void rows_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  const int64_t save = arguments.next<int64_t>();
  check_all(in);
  FASTKD_CHECK(save >= 0 && save <= 2, "save: 0, 1 or 2 wanted, got ", save);
  const Tensor grad =
      save == 1 ? torch::stable::new_empty(in.student, in.student.sizes()) : torch::stable::new_empty(in.student, {0});
  std::vector<int64_t> stats_shape = in.leading();
  stats_shape.push_back(sizeof(RowsStats) / sizeof(double));
  const Tensor stats = empty_like_rows(in, save == 2 ? stats_shape : std::vector<int64_t>{0}, ScalarType::Double);
  const Tensor loss = dispatch_compute(in.compute(), [&](auto t) {
    return run_forward<decltype(t)>(in, save == 1 ? grad.mutable_data_ptr() : nullptr, grad,
                                    save == 2 ? static_cast<RowsStats*>(stats.mutable_data_ptr()) : nullptr);
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
  stack[2] = torch::stable::detail::from(stats);
}

void rows_fwd_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  check_all(in);
  stack[0] = torch::stable::detail::from(dispatch_compute(in.compute(), [&](auto t) {
    return run_forward<decltype(t)>(in, in.student.mutable_data_ptr(), in.student, nullptr);
  }));
}

void run_backward(const RowsInputs& in, const Tensor& stats, const Tensor& upstream, const Tensor& grad) {
  FASTKD_CHECK(stats.scalar_type() == ScalarType::Double && stats.numel() == 5 * in.N() && stats.is_contiguous() &&
                   lies_with(stats, in.student),
               "stats: those of rows_fwd wanted");
  FASTKD_CHECK(upstream.numel() == 1 || upstream.numel() == in.N(), "upstream: one element, or one per row wanted");
  dispatch_compute(in.compute(), [&](auto t) {
    using T = decltype(t);
    const Context context(in.student);
    Call<T> call(in, grad.mutable_data_ptr(), grad, context);
    RowsParams<T>& P = call.P;
    P.stats = static_cast<RowsStats*>(const_cast<void*>(stats.const_data_ptr()));
    P.upstream = optional_data<T>(upstream, in, upstream.numel(), in.compute(), "upstream");
    P.upstream_stride = upstream.numel() == 1 ? 0 : 1;
    if (P.N == 0) return;
    FASTKD_CUDA_CHECK(with_divergence(
        P.divergence, [&](auto which) { return cuda::rows_backward<which.value>(P, context.device, context.stream); }));
  });
}

void rows_bwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  const Tensor stats = arguments.next<Tensor>(), upstream = arguments.next<Tensor>();
  check_all(in);
  const Tensor grad = torch::stable::new_empty(in.student, in.student.sizes());
  run_backward(in, stats, upstream, grad);
  stack[0] = torch::stable::detail::from(grad);
}

void rows_bwd_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  const Tensor stats = arguments.next<Tensor>(), upstream = arguments.next<Tensor>();
  check_all(in);
  run_backward(in, stats, upstream, in.student);
}

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("rows_fwd", &rows_fwd);
  m.impl("rows_fwd_", &rows_fwd_);
  m.impl("rows_bwd", &rows_bwd);
  m.impl("rows_bwd_", &rows_bwd_);
}

}  // namespace fastkd
