// The op of adaptive_kl_div's weights, once for every device. A device is that of RowsOps, which also has
//   head(P, weight)   runs the schedule; P.parameter is mu, weight [N]
#pragma once
#include "common/rows_op.h"

namespace fastkd {

template <class Device>
void head_weight(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = HeadWeight::read(arguments);
  RowsCall call{};
  call.student = in.student;
  call.teacher = in.teacher;
  call.temperature = in.temperature;
  call.temperature_rows = in.temperature_rows;
  call.teacher_temperature = in.teacher_temperature;
  call.teacher_temperature_rows = in.teacher_temperature_rows;
  call.mask = in.mask;
  call.scale = 1;
  using Ops = RowsOps<Device>;
  Ops::check_all(call);
  FASTKD_CHECK(Ops::lies_dense(in.student_weight, call, number_of_rows(call), ScalarType::Double),
               "student_weight: a contiguous float64 tensor ", Device::kName, " with one element per row wanted");
  FASTKD_CHECK(!in.mu_tensor || in.mu_tensor->dim() == 0, "mu: one number for all rows wanted");
  dispatch_compute(computed_in(call), [&](auto t) {
    using T = decltype(t);
    const Device device(call.student);
    RowsParams<T> P = Ops::template params<T>(call, {});
    P.parameter = Ops::template number<double>(in.mu, in.mu_tensor, call, "mu", "a number from 0 to 1",
                                               [](double x) { return x >= 0 && x <= 1; });
    if (P.N > 0) device.head(P, static_cast<double*>(in.student_weight.mutable_data_ptr()));
  });
}

}  // namespace fastkd
