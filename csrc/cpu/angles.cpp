// The angles op on the CPU: the weighted sum of RKD's angles, by angles.h, and its distances, by the
// pairs schedule.
#include "cpu/angles.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/embeddings_inputs.h"
#include "cpu/pairs.h"

namespace fastkd {
namespace {

// The weighted loss of the angles, computed in T or in more. grad [N, D_s], where it is not null:
// += its gradient.
template <class T>
double add_angles(const AnglesInputs& in, T* grad) {
  const int64_t N = rows_there(in);
  const Centred<double> student = centre<double>(in.student, N), teacher = centre<double>(in.teacher, N);
  double loss = 0;
  if (angles::Angles<T>(student, teacher, in.angle_delta).run(in.angle_weight, grad, loss)) return loss;
  const int64_t n = grad ? student.N * student.D : 0;
  std::vector<double> wide(n);
  angles::Angles<double>(student, teacher, in.angle_delta).run(in.angle_weight, grad ? wide.data() : nullptr, loss);
  for (int64_t i = 0; i < n; ++i) grad[i] += T(wide[i]);
  return loss;
}

// grad [N, D_s], where it is not null: the gradient.
template <class T>
double angles_loss(const AnglesInputs& in, T* grad) {
  const int64_t n = grad ? in.student.numel() : 0;
  double loss = 0;
  std::fill_n(grad, n, T(0));
  const int64_t N = rows_there(in);
  if (N < 2) return 0;
  if (in.distance_weight != 0) {
    const Centred<T> student = centre<T>(in.student, N), teacher = centre<T>(in.teacher, N);
    loss = in.distance_weight * pairs_loss(Relation::kRkdDistance, RelationOptions{in.distance_delta, true, N}, student,
                                           teacher, static_cast<const T*>(nullptr), grad);
    for (int64_t i = 0; i < n; ++i) grad[i] *= T(in.distance_weight);
  }
  if (in.angle_weight != 0) loss += add_angles(in, grad);
  return loss;
}

void angles_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const AnglesInputs in{{AnglesCall::read(arguments)}};
  check(in);
  Tensor loss = in.new_loss(), grad = in.new_grad(in.save);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    const bool direct = grad.scalar_type() == in.compute();
    Tensor wide = in.save && !direct ? torch::stable::new_empty(grad, grad.sizes(), in.compute()) : grad;
    *static_cast<T*>(loss.mutable_data_ptr()) =
        T(angles_loss<T>(in, in.save ? static_cast<T*>(wide.mutable_data_ptr()) : nullptr));
    if (in.save && !direct) torch::stable::copy_(grad, wide);
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("angles_fwd", &angles_fwd); }

}  // namespace fastkd
