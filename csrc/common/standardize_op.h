// The ops that standardize logits, once for every device: a class as RowsOps has it, with
//   run(P, backward)                 runs the kernels
#pragma once
#include "calls.h"
#include "common/rows_tensor.h"
#include "common/standardize_params.h"

namespace fastkd {

template <class Device>
struct StandardizeOps {
  static void check_like(const Tensor& x, const Tensor& like, const char* name) {
    bool same = Device::lies_with(x, like) && x.dim() == like.dim();
    for (int64_t d = 0; same && d < like.dim(); ++d) same = x.size(d) == like.size(d);
    FASTKD_CHECK(same, name, ": a tensor of x's shape ", Device::kName, " wanted");
  }
  static void check_wide(const Tensor& x, const Tensor& of, const char* name) {
    check_like(x, of, name);
    FASTKD_CHECK(x.scalar_type() == ScalarType::Double ||
                     (x.scalar_type() == ScalarType::Float && of.scalar_type() != ScalarType::Double),
                 name, ": float32, or float64, wanted, and at least what x has");
  }

  template <class T>
  static StandardizeParams<T> params(const Tensor& x, const OptionalTensor& mask, const OptionalTensor& moments) {
    StandardizeParams<T> P{};
    P.rows.V = x.size(x.dim() - 1);
    P.rows.N = P.rows.V == 0 ? 0 : x.numel() / P.rows.V;
    P.rows.student = rows_tensor(x, const_cast<void*>(x.const_data_ptr()), "x");
    P.rows.teacher = P.rows.student;
    const auto dense = [&](const Tensor& y, ScalarType type, int64_t of_row, const char* name) {
      FASTKD_CHECK(
          Device::lies_with(y, x) && y.scalar_type() == type && y.numel() == of_row * P.rows.N && y.is_contiguous(),
          name, ": a contiguous tensor ", Device::kName, " with ", of_row,
          " elements of the right dtype per row wanted");
      return const_cast<void*>(y.const_data_ptr());
    };
    if (mask) P.rows.mask = static_cast<const bool*>(dense(*mask, ScalarType::Bool, 1, "mask"));
    if (moments) P.moments = static_cast<RowMoments*>(dense(*moments, ScalarType::Double, 3, "moments"));
    return P;
  }

  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = Standardize::read(arguments);
    FASTKD_CHECK(Device::lies_with(in.x, in.x) && in.x.dim() > 0, "x: a tensor [*, V] wanted");
    check_wide(in.out, in.x, "out");
    dispatch_compute(in.out.scalar_type(), [&](auto t) {
      using T = decltype(t);
      StandardizeParams<T> P = params<T>(in.x, in.mask, in.moments);
      P.rows.grad = rows_tensor(in.out, in.out.mutable_data_ptr(), "out");
      if (P.rows.N > 0) Device(in.x).run(P, false);
    });
  }

  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = StandardizeBackward::read(arguments);
    FASTKD_CHECK(Device::lies_with(in.x, in.x) && in.x.dim() > 0, "x: a tensor [*, V] wanted");
    check_wide(in.upstream, in.x, "upstream");
    check_like(in.grad, in.x, "grad");
    FASTKD_CHECK(in.grad.scalar_type() == in.x.scalar_type(), "grad: the dtype of x wanted");
    if (in.addend) {
      check_like(*in.addend, in.x, "addend");
      bool same = in.addend->scalar_type() == in.upstream.scalar_type();
      for (int64_t d = 0; d < in.x.dim(); ++d) same = same && in.addend->stride(d) == in.upstream.stride(d);
      FASTKD_CHECK(same, "addend: the dtype and strides of upstream wanted");
    }
    dispatch_compute(in.upstream.scalar_type(), [&](auto t) {
      using T = decltype(t);
      StandardizeParams<T> P = params<T>(in.x, in.mask, in.moments);
      P.rows.teacher = rows_tensor(in.upstream, const_cast<void*>(in.upstream.const_data_ptr()), "upstream");
      P.rows.grad = rows_tensor(in.grad, in.grad.mutable_data_ptr(), "grad");
      if (in.addend) P.addend = static_cast<const char*>(in.addend->const_data_ptr());
      if (P.rows.N > 0) Device(in.x).run(P, true);
    });
  }
};

}  // namespace fastkd
