// What the op of a strip of cosines is given, on every device, checked.
#pragma once
#include "calls.h"
#include "common/rows_tensor.h"

namespace fastkd {

inline void check(const PktStripCall& in) {
  const ScalarType type = in.student.scalar_type();
  FASTKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "student: float32 or float64 wanted");
  for (const Tensor* x : {&in.student, &in.teacher}) {
    FASTKD_CHECK(x->dim() == 2 && x->is_contiguous() && x->scalar_type() == type,
                 "student and teacher: contiguous tensors [rows, columns] of one dtype wanted");
  }
  const int64_t rows = in.student.size(0), columns = in.student.size(1), N = in.row + columns;
  FASTKD_CHECK(in.teacher.size(0) == rows && in.teacher.size(1) == columns && in.row >= 0 && rows <= columns,
               "student and teacher: strips of one shape wanted, from the diagonal on");
  for (const Tensor* x : {&in.valid, &in.student_inverse, &in.teacher_inverse, &in.weight, &in.scale}) {
    FASTKD_CHECK(x->numel() == N && x->is_contiguous() && x->scalar_type() == type,
                 "valid, inverses, weight and scale: one element per sample wanted, of the strip's dtype");
  }
  FASTKD_CHECK(in.slopes.numel() == N && in.slopes.is_contiguous() && in.slopes.scalar_type() == ScalarType::Double,
               "slopes: one float64 per sample wanted");
  FASTKD_CHECK(in.eps > 0 && std::isfinite(in.eps), "eps: a positive finite number wanted, got ", in.eps);
}

}  // namespace fastkd
