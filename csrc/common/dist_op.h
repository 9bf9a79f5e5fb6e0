// The ops of the dist schedule, once for every device: a class as rows_op.h describes it, which has in place of
// forward and backward
//   dist_forward(P, loss)   the loss, P.of_rows and P.columns, also where there are no rows
//   dist_backward(P, grad) the gradient from these
#pragma once
#include "common/dist_params.h"
#include "common/numbers.h"
#include "common/rows_op.h"

namespace fastkd {

template <class Device>
struct DistOps {
  using Rows = RowsOps<Device>;

  // The same tensors, as the rows schedule is called.
  static RowsCall rows_call(const DistCall& in, double temperature) {
    RowsCall call{};
    call.student = in.student;
    call.teacher = in.teacher;
    call.temperature = call.teacher_temperature = temperature;
    call.mask = in.mask;
    call.scale = in.scale;
    call.scale_tensor = in.scale_tensor;
    return call;
  }

  template <class T>
  static DistParams<T> params(const RowsCall& call, const std::vector<double>& number, const Tensor& rows,
                              const Tensor& columns, const OptionalTensor& grad) {
    DistParams<T> P{};
    P.rows = Rows::template params<T>(call, grad);
    P.inter_weight = number[0];
    P.intra_weight = number[1];
    P.temperature = number[2];
    P.eps = number[3];
    const int64_t N = number_of_rows(call);
    constexpr int64_t kSize = sizeof(DistRow) / sizeof(double);
    FASTKD_CHECK(Rows::lies_dense(rows, call, kSize * N, ScalarType::Double), "rows: a contiguous float64 tensor ",
                 Device::kName, " with ", kSize, " elements per row wanted");
    FASTKD_CHECK(Rows::lies_dense(columns, call, 3 * dist_padded(P.rows.V), kScalarType<T>),
                 "columns: a contiguous tensor ", Device::kName,
                 " of the dtype that is computed in wanted, with 3 elements per class, whose number is rounded up to ",
                 kDistPadding);
    P.of_rows = static_cast<DistRow*>(const_cast<void*>(rows.const_data_ptr()));
    P.columns = static_cast<T*>(const_cast<void*>(columns.const_data_ptr()));
    return P;
  }

  static std::vector<double> checked_numbers(const DistCall& in) {
    const std::vector<double> x = numbers(in.numbers, 4, "numbers");
    const auto wanted = [](bool good, const char* name, const char* what, double x) {
      FASTKD_CHECK(good && std::isfinite(x), name, ": a ", what, " wanted, got ", x);
    };
    wanted(x[0] >= 0, "inter_weight", "finite number of at least 0", x[0]);
    wanted(x[1] >= 0, "intra_weight", "finite number of at least 0", x[1]);
    wanted(x[2] > 0, "temperature", "positive finite number", x[2]);
    wanted(x[3] >= 1e-37, "eps", "number of at least 1e-37", x[3]);
    return x;
  }

  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = DistCall::read(arguments);
    const auto out = DistForward::read(arguments);
    const std::vector<double> number = checked_numbers(in);
    const RowsCall call = rows_call(in, number[2]);
    Rows::check_all(call);
    FASTKD_CHECK(Rows::lies_dense(out.loss, call, 1, computed_in(call)), "loss: one element ", Device::kName,
                 " of the dtype that is computed in wanted");
    dispatch_compute(computed_in(call), [&](auto t) {
      using T = decltype(t);
      const Device device(in.student);
      DistParams<T> P = params<T>(call, number, out.rows, out.columns, {});
      device.dist_forward(P, static_cast<T*>(out.loss.mutable_data_ptr()));
    });
  }

  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = DistCall::read(arguments);
    const auto rest = DistBackward::read(arguments);
    const std::vector<double> number = checked_numbers(in);
    const RowsCall call = rows_call(in, number[2]);
    Rows::check_all(call);
    Rows::check_grad(rest.grad, call);
    FASTKD_CHECK(Rows::lies_dense(rest.upstream, call, 1, computed_in(call)), "upstream: one element ", Device::kName,
                 " of the dtype that is computed in wanted");
    dispatch_compute(computed_in(call), [&](auto t) {
      using T = decltype(t);
      const Device device(in.student);
      DistParams<T> P = params<T>(call, number, rest.rows, rest.columns, rest.grad);
      P.upstream = static_cast<const T*>(rest.upstream.const_data_ptr());
      if (P.rows.N > 0) device.dist_backward(P, rest.grad);
    });
  }
};

}  // namespace fastkd
