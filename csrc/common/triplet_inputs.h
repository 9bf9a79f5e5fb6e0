// What the op of a strip of triplets is given, on every device, checked.
#pragma once
#include "calls.h"
#include "common/rows_tensor.h"

namespace fastkd {

inline void check(const TripletStripCall& in) {
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
