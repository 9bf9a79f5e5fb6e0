// The ops of what is beside K classes of a row, once for every device: a class as RowsOps has it, with
//   complement(P, backward)          runs the kernels
#pragma once
#include "common/complement_params.h"
#include "common/rows_op.h"

namespace fastkd {

template <class Device>
struct ComplementOps {
  template <class T, class In>
  static ComplementParams<T> params(const In& in, const RowsCall& call) {
    ComplementParams<T> P{};
    P.rows.V = classes(call);
    P.rows.N = number_of_rows(call);
    P.rows.student = rows_tensor(in.student, const_cast<void*>(in.student.const_data_ptr()), "student");
    P.rows.teacher = P.rows.student;
    P.rows.temperature =
        RowsOps<Device>::template temperature<T>(in.temperature, in.temperature_rows, call, "temperature");
    P.rows.mask = RowsOps<Device>::template per_row<bool>(in.mask, call, ScalarType::Bool, "mask");
    FASTKD_CHECK(in.indices.dim() == 2 && in.indices.size(0) == P.rows.N, "indices: shape [N, K] wanted");
    P.K = in.indices.size(1);
    P.indices = static_cast<const int64_t*>(dense(in.indices, call, ScalarType::Long, P.K, "indices"));
    P.sums = static_cast<ComplementSums*>(dense(in.sums, call, ScalarType::Double, 2, "sums"));
    return P;
  }
  static void* dense(const Tensor& x, const RowsCall& call, ScalarType type, int64_t of_row, const char* name) {
    FASTKD_CHECK(RowsOps<Device>::lies_dense(x, call, of_row * number_of_rows(call), type), name,
                 ": a contiguous tensor ", Device::kName, " with ", of_row,
                 " elements of the right dtype per row wanted");
    return const_cast<void*>(x.const_data_ptr());
  }
  // What checks and readers of the rows schedule look at.
  static RowsCall rows_call(const Tensor& student) {
    RowsCall call{};
    call.student = call.teacher = student;
    FASTKD_CHECK(Device::lies_with(student, student) && student.dim() > 0, "student: a tensor [*, V] wanted");
    return call;
  }

  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = Complement::read(arguments);
    const RowsCall call = rows_call(in.student);
    dispatch_compute(computed_in(call), [&](auto t) {
      using T = decltype(t);
      ComplementParams<T> P = params<T>(in, call);
      P.logits = static_cast<double*>(dense(in.logits, call, ScalarType::Double, P.K + 1, "logits"));
      if (P.rows.N > 0) Device(in.student).complement(P, false);
    });
  }

  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = ComplementBackward::read(arguments);
    const RowsCall call = rows_call(in.student);
    RowsOps<Device>::check_grad(in.grad, call);
    dispatch_compute(computed_in(call), [&](auto t) {
      using T = decltype(t);
      ComplementParams<T> P = params<T>(in, call);
      P.upstream = static_cast<const double*>(dense(in.upstream, call, ScalarType::Double, P.K + 1, "upstream"));
      P.rows.grad = rows_tensor(in.grad, in.grad.mutable_data_ptr(), "grad");
      if (in.addend) {
        const Tensor& x = *in.addend;
        bool same =
            Device::lies_with(x, in.student) && x.scalar_type() == kScalarType<T> && x.dim() == in.student.dim();
        for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == in.student.size(d);
        FASTKD_CHECK(same, "addend: a tensor of the student's shape, in the dtype that is computed in, wanted");
        P.rows.teacher = rows_tensor(x, const_cast<void*>(x.const_data_ptr()), "addend");
        P.addend = true;
      }
      if (P.rows.N > 0) Device(in.student).complement(P, true);
    });
  }
};

}  // namespace fastkd
