// What the attention ops are given, on every device: read off the dispatcher's stack, and checked.
#pragma once
#include "calls.h"
#include "common/features_params.h"
#include "common/numbers.h"
#include "common/rows_tensor.h"

namespace fastkd {

struct AttentionInputs : AttentionCall {
  // the number in place of the tensor that holds it
  double p = number(AttentionCall::p, "p");

  int64_t B() const { return student.size(0); }
  int64_t positions() const { return student.size(2) * student.size(3); }
  ScalarType compute() const { return compute_type(student.scalar_type(), teacher.scalar_type()); }
};

inline void check(const AttentionInputs& in) {
  const Tensor &s = in.student, &t = in.teacher;
  FASTKD_CHECK(s.dim() == 4 && t.dim() == 4, "student and teacher: maps [B, C, H, W] wanted");
  for (const int64_t d : {0, 2, 3}) {
    FASTKD_CHECK(s.size(d) == t.size(d), "student and teacher: the same B, H and W wanted");
  }
  FASTKD_CHECK(s.size(1) > 0 && t.size(1) > 0, "student and teacher: at least one channel wanted");
  FASTKD_CHECK(in.p >= 1 && std::isfinite(in.p), "p: a finite number of at least 1 wanted, got ", in.p);
  to_dtype(s.scalar_type(), "student");
  to_dtype(t.scalar_type(), "teacher");
}

// Positions as rows, of which each sample has positions() in order; channels as their elements.
inline RowsTensor positions_tensor(const Tensor& x, void* data, const char* name) {
  return rows_tensor(x, data, name, 1);
}

}  // namespace fastkd
