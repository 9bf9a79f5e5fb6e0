// What the rows ops are given, on every device: sizes, types and checks.
#pragma once
#include <cmath>

#include "calls.h"
#include "common/rows_params.h"
#include "common/rows_tensor.h"
#include "divergence_list.h"

namespace fastkd {

inline int64_t classes(const RowsCall& in) { return in.student.size(in.student.dim() - 1); }
inline int64_t number_of_rows(const RowsCall& in) { return classes(in) == 0 ? 0 : in.student.numel() / classes(in); }
inline ScalarType computed_in(const RowsCall& in) {
  return compute_type(in.student.scalar_type(), in.teacher.scalar_type());
}

inline void check(const RowsCall& in) {
  const Tensor &s = in.student, &t = in.teacher;
  FASTKD_CHECK(s.dim() >= 1 && s.dim() == t.dim(), "student and teacher: the same shape [*, V] wanted");
  for (int64_t d = 0; d < s.dim(); ++d) {
    FASTKD_CHECK(s.size(d) == t.size(d), "student and teacher: the same shape [*, V] wanted");
  }
  FASTKD_CHECK(classes(in) > 0, "student: at least one class wanted");
  FASTKD_CHECK(in.scale > 0 && std::isfinite(in.scale), "normalizer: a positive finite number wanted, got ",
               1 / in.scale);
  FASTKD_CHECK(in.divergence >= 0 && in.divergence < int64_t(Divergence::kCount), "divergence: unknown number ",
               in.divergence);
  const bool parted = in.target_loss != 0;
  FASTKD_CHECK(in.target_loss >= 0 && in.target_loss < int64_t(TargetLoss::kCount), "target_loss: unknown number ",
               in.target_loss);
  FASTKD_CHECK(!parted || in.target, "target: a class for each row wanted");
  FASTKD_CHECK(parted == (Divergence(in.divergence) == Divergence::kNonTargetKL),
               "target_loss: one with this divergence wanted, got ", in.target_loss);
}

}  // namespace fastkd
