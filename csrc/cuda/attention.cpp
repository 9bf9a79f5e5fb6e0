// The ops of attention transfer on the GPU: checks the contract, allocates, launches. Nothing here waits
// for the device. FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include "common/attention_inputs.h"
#include "cuda/attention_launch.h"
#include "cuda/context.h"
#include "cuda/features_plan.h"
#include "cuda/features_tensors.h"

namespace fastkd {
namespace {

using cuda::Context;
using cuda::FeaturesPart;
using cuda::lies_with;

template <class T>
class Attention {
 public:
  // grad: null where it is not wanted
  Attention(const AttentionInputs& in, const Tensor* grad)
      : in_(in), grad_(grad), context_(in.student), B_(in.B()), positions_(in.positions()) {}

  void run(const T* upstream, T* loss) const {
    const int64_t rows = B_ * positions_;
    const Tensor workspace = torch::stable::new_empty(in_.student, {2 * rows + B_ + 1}, ScalarType::Double);
    double* maps[] = {static_cast<double*>(workspace.mutable_data_ptr()), nullptr};
    maps[1] = maps[0] + rows;
    double *losses = maps[1] + rows, *total = losses + B_;
    if (rows > 0) {
      powers(maps);
      compare(maps, losses, upstream);
      if (grad_) slopes(maps);
    }
    if (loss) finish(rows, losses, total, loss);
  }

 private:
  FeaturesPart<T> part(const Tensor& x, const Tensor* grad) const {
    FeaturesPart<T> part{};
    part.student = cuda::features_tensor(positions_tensor(x, const_cast<void*>(x.const_data_ptr()), "maps"));
    if (grad) part.grad = cuda::features_tensor(positions_tensor(*grad, grad->mutable_data_ptr(), "grad"));
    part.N = B_ * positions_;
    part.D = x.size(1);
    cuda::set_leading(part, {{&x, &part.student}, {grad, &part.grad}}, 1);
    cuda::plan_rows(part, false);
    return part;
  }

  void powers(double* const* maps) const {
    cuda::AttentionPowers<T> A{{part(in_.student, nullptr), part(in_.teacher, nullptr)}, {maps[0], maps[1]}, in_.p, 0};
    const cuda::FeaturesGrid grid = cuda::plan_blocks(A.sides, 2, context_.device);
    A.room = grid.room;
    FASTKD_CUDA_CHECK(cuda::attention_powers(A, grid.blocks, context_.stream));
  }

  void compare(double* const* maps, double* losses, const T* upstream) const {
    cuda::AttentionMaps<T> M{};
    M.positions = positions_;
    M.student = maps[0];
    M.teacher = maps[1];
    M.factors = grad_ != nullptr;
    M.scale = in_.p / double(in_.student.size(1)) / (double(B_) * double(positions_));
    M.upstream = upstream;
    M.losses = losses;
    FASTKD_CUDA_CHECK(cuda::attention_maps(M, B_, context_.stream));
  }

  void slopes(const double* const* maps) const {
    cuda::AttentionSlopes<T> A{part(in_.student, grad_), maps[0], maps[1], in_.p};
    const cuda::FeaturesGrid grid = cuda::plan_blocks(&A.layer, 1, context_.device);
    FASTKD_CUDA_CHECK(cuda::attention_slopes(A, grid.blocks, context_.stream));
  }

  // The samples as the blocks of one layer.
  void finish(int64_t rows, const double* losses, double* total, T* loss) const {
    cuda::FeaturesLosses<T> L{};
    L.count = 1;
    L.first_block[1] = int32_t(rows > 0 ? B_ : 0);
    L.scale[0] = rows > 0 ? 1 / double(rows) : 0;
    L.layer_weight[0] = 1;
    L.partials = losses;
    L.total = total;
    L.first = true;
    L.layers = loss;
    FASTKD_CUDA_CHECK(cuda::features_finish(L, context_.stream));
  }

  const AttentionInputs& in_;
  const Tensor* grad_;
  const Context context_;
  const int64_t B_, positions_;
};

void check_all(const AttentionInputs& in) {
  check(in);
  FASTKD_CHECK(lies_with(in.student, in.student) && lies_with(in.teacher, in.student),
               "student and teacher: tensors on one GPU wanted");
  for (const Tensor* x : {&in.student, &in.teacher}) {
    FASTKD_CHECK(x->size(1) <= cuda::kFeaturesMost, "student and teacher: at most ", cuda::kFeaturesMost,
                 " channels wanted, got ", x->size(1));
  }
}

void attention_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const AttentionInputs in{AttentionCall::read(arguments)};
  const bool save = AttentionForward::read(arguments).save;
  check_all(in);
  const Tensor grad = save ? torch::stable::empty_like(in.student) : torch::stable::new_empty(in.student, {0});
  const Tensor loss = torch::stable::new_empty(in.student, {}, in.compute());
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T>(in, save ? &grad : nullptr).run(nullptr, static_cast<T*>(loss.mutable_data_ptr()));
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

void attention_bwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const AttentionInputs in{AttentionCall::read(arguments)};
  const Tensor upstream = AttentionBackward::read(arguments).upstream;
  check_all(in);
  FASTKD_CHECK(lies_with(upstream, in.student) && upstream.numel() == 1 && upstream.scalar_type() == in.compute(),
               "upstream: one element of the loss's dtype wanted");
  const Tensor grad = torch::stable::empty_like(in.student);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T>(in, &grad).run(static_cast<const T*>(upstream.const_data_ptr()), nullptr);
  });
  stack[0] = torch::stable::detail::from(grad);
}

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace fastkd
