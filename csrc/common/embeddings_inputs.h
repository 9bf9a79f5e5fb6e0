// What the pairs and the angles ops are given, on every device: read off the dispatcher's stack,
// and checked.
#pragma once
#include "calls.h"
#include "common/embeddings_params.h"
#include "common/numbers.h"
#include "common/rows_tensor.h"

// Of the ops: a build with relations of its own, beside fastkd's, has its own.
#ifndef FASTKD_NAMESPACE
#if defined(FASTKD_CUSIM)
#define FASTKD_NAMESPACE fastkd_cusim
#else
#define FASTKD_NAMESPACE fastkd
#endif
#endif

namespace fastkd {

// The call of an op of embeddings of both sides, of which rows from `count` on are not there: they have no gradient.
template <class Call>
struct RelationInputs : Call {
  using Call::student, Call::teacher, Call::count;

  int64_t N() const { return student.size(0); }
  const int64_t* count_data() const { return count ? static_cast<const int64_t*>(count->const_data_ptr()) : nullptr; }
  // Of the loss, and of what is computed.
  ScalarType compute() const { return compute_type(student.scalar_type(), teacher.scalar_type()); }
  // A gradient in float16 would underflow before a loss scaler multiplies it.
  ScalarType grad_type() const {
    return student.scalar_type() == ScalarType::Half ? ScalarType::Float : student.scalar_type();
  }
  Tensor new_loss() const { return torch::stable::new_empty(student, {}, compute()); }
  // [N, D_s] contiguous; (0,) where it is not saved
  Tensor new_grad(bool save) const {
    const std::vector<int64_t> shape =
        save ? std::vector<int64_t>{student.size(0), student.size(1)} : std::vector<int64_t>{0};
    return torch::stable::new_empty(student, shape, grad_type());
  }
};

// A call's numbers are read: they take the place of the tensors that hold them.
struct PairsInputs : RelationInputs<PairsCall> {
  double delta = number(PairsCall::delta, "delta");
};

struct AnglesInputs : RelationInputs<AnglesCall> {
  std::vector<double> of_both = fastkd::numbers(numbers, 4, "numbers");
  double angle_weight = of_both[0], angle_delta = of_both[1];
  double distance_weight = of_both[2], distance_delta = of_both[3];
};

inline Embeddings embeddings(const Tensor& x, const char* name) {
  return {static_cast<const char*>(x.const_data_ptr()),
          to_dtype(x.scalar_type(), name),
          int32_t(x.element_size()),
          x.size(1),
          x.stride(0),
          x.stride(1)};
}

template <class Call>
void check_embeddings(const RelationInputs<Call>& in) {
  const Tensor &s = in.student, &t = in.teacher;
  FASTKD_CHECK(s.dim() == 2 && t.dim() == 2, "student and teacher: embeddings [N, D] wanted");
  FASTKD_CHECK(s.size(0) == t.size(0), "student and teacher: as many rows wanted, got ", s.size(0), " and ", t.size(0));
  FASTKD_CHECK(s.size(1) > 0 && t.size(1) > 0, "student and teacher: at least one feature wanted");
  to_dtype(s.scalar_type(), "student");
  to_dtype(t.scalar_type(), "teacher");
  FASTKD_CHECK(!in.count || (in.count->numel() == 1 && in.count->scalar_type() == ScalarType::Long),
               "count: an int64 tensor of one element wanted");
}

inline void check_delta(double delta, const char* name) {
  FASTKD_CHECK(delta > 0 && std::isfinite(delta), name, ": a positive finite number wanted, got ", delta);
}

inline void check(const PairsInputs& in) {
  check_embeddings(in);
  FASTKD_CHECK(!in.weight || (in.weight->dim() == 1 && in.weight->size(0) == in.N() && in.weight->is_contiguous() &&
                              in.weight->scalar_type() == in.compute()),
               "weight: one per row wanted, contiguous, of the dtype that is computed in");
  FASTKD_CHECK(in.relation >= 0 && in.relation < int64_t(Relation::kCount), "relation: unknown number ", in.relation);
  check_delta(in.delta, "delta");
}

inline void check(const AnglesInputs& in) {
  check_embeddings(in);
  check_delta(in.angle_delta, "angle_delta");
  check_delta(in.distance_delta, "distance_delta");
  for (const double weight : {in.angle_weight, in.distance_weight}) {
    FASTKD_CHECK(weight >= 0 && std::isfinite(weight), "weight: a finite number of at least 0 wanted, got ", weight);
  }
}

}  // namespace fastkd
