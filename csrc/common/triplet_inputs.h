// What the op of a strip of triplets is given, on every device: read off the dispatcher's stack, and checked.
#pragma once
#include "common/rows_tensor.h"

namespace fastkd {

struct TripletInputs {
  explicit TripletInputs(Arguments& a)
      : strip(a.next<Tensor>()),
        x(a.next<Tensor>()),
        norms(a.next<Tensor>()),
        positives(a.next<Tensor>()),
        first(a.next<Tensor>()),
        last(a.next<Tensor>()),
        valid(a.next<Tensor>()),
        count(a.next<Tensor>()),
        weight(a.next<Tensor>()),
        margin(a.next<double>()),
        row(a.next<int64_t>()),
        grad(a.next<OptionalTensor>()) {}

  Tensor strip, x, norms;                // [rows, N], [N, D], [N], of the compute dtype
  Tensor positives, first, last, valid;  // int64 [positives], [N], [N]; bool [N]
  Tensor count, weight;                  // int64, one element: of those that are valid; [N] of the compute dtype
  double margin;
  int64_t row;
  OptionalTensor grad;  // [N, D] of the compute dtype
};

inline void check(const TripletInputs& in) {
  const ScalarType type = in.strip.scalar_type();
  FASTKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "strip: float32 or float64 wanted");
  FASTKD_CHECK(in.strip.dim() == 2 && in.x.dim() == 2, "strip and x: [rows, N] and [N, D] wanted");
  const int64_t rows = in.strip.size(0), N = in.strip.size(1), D = in.x.size(1);
  const auto is = [](const Tensor& x, ScalarType type, int64_t elements) {
    return x.is_contiguous() && x.scalar_type() == type && x.numel() == elements;
  };
  FASTKD_CHECK(in.row >= 0 && in.row + rows <= N, "row: rows of the strip that are among its columns wanted");
  FASTKD_CHECK(is(in.strip, type, rows * N) && is(in.x, type, N * D) && is(in.norms, type, N) &&
                   is(in.weight, type, N) && (!in.grad || is(*in.grad, type, N * D)),
               "x, norms, weight and grad: contiguous, of the strip's dtype and its N samples wanted");
  FASTKD_CHECK(in.positives.dim() == 1 && is(in.positives, ScalarType::Long, in.positives.size(0)) &&
                   is(in.first, ScalarType::Long, N) && is(in.last, ScalarType::Long, N) &&
                   is(in.count, ScalarType::Long, 1) && is(in.valid, ScalarType::Bool, N),
               "positives, first, last, count: int64, valid: bool, and contiguous of the strip's N samples wanted");
  FASTKD_CHECK(in.margin > 0 && std::isfinite(in.margin), "margin: a positive finite number wanted, got ", in.margin);
}

}  // namespace fastkd
