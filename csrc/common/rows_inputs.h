// What the rows ops are given, on every device: read off the dispatcher's stack, and checked.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/params.h"

namespace fastkd {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Reads an op's arguments off the dispatcher's stack, in the schema's order.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : stack_(stack) {}
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*stack_++);
  }

 private:
  StableIValue* stack_;
};

// What every rows op starts with: _ROWS_OPTIONS of fastkd/_library.py.
struct RowsInputs {
  explicit RowsInputs(Arguments& a)
      : student(a.next<Tensor>()),
        teacher(a.next<Tensor>()),
        divergence(a.next<int64_t>()),
        parameter(a.next<double>()),
        temperature(a.next<double>()),
        temperature_rows(a.next<OptionalTensor>()),
        teacher_temperature(a.next<double>()),
        teacher_temperature_rows(a.next<OptionalTensor>()),
        t_squared(a.next<bool>()),
        mask(a.next<OptionalTensor>()),
        weight(a.next<OptionalTensor>()),
        reduction(a.next<int64_t>()),
        normalizer(a.next<std::optional<double>>()),
        normalizer_tensor(a.next<OptionalTensor>()) {}

  Tensor student, teacher;  // [*, V]
  int64_t divergence;
  double parameter;
  double temperature;
  OptionalTensor temperature_rows;  // [N]
  double teacher_temperature;
  OptionalTensor teacher_temperature_rows;  // [N]
  bool t_squared;
  OptionalTensor mask;    // [N]
  OptionalTensor weight;  // [N]
  int64_t reduction;
  std::optional<double> normalizer;
  OptionalTensor normalizer_tensor;  // []

  int64_t V() const { return student.size(student.dim() - 1); }
  int64_t N() const { return V() == 0 ? 0 : student.numel() / V(); }
  ScalarType compute() const { return compute_type(student.scalar_type(), teacher.scalar_type()); }
  std::vector<int64_t> leading() const {
    const auto sizes = student.sizes();
    return {sizes.begin(), sizes.end() - 1};
  }
};

// The rows are what all dimensions but one step through, in their order.
inline RowsTensor rows_tensor(const Tensor& x, void* data, const char* name, int64_t of_row) {
  RowsTensor r{};
  r.data = static_cast<char*>(data);
  r.dtype = to_dtype(x.scalar_type(), name);
  r.element_size = int32_t(x.element_size());
  r.stride_v = x.stride(of_row);
  for (int64_t d = 0; d < x.dim(); ++d) {  // dimensions that lie one after the other in memory are one
    const int64_t size = x.size(d), stride = x.stride(d);
    if (d == of_row || size == 1) continue;
    if (r.dims > 0 && r.stride[r.dims - 1] == size * stride) {
      r.size[r.dims - 1] *= size;
      r.stride[r.dims - 1] = stride;
      continue;
    }
    FASTKD_CHECK(r.dims < kMaxLeadingDims, name, ": more than ", kMaxLeadingDims, " separate leading dimensions");
    r.size[r.dims] = size;
    r.stride[r.dims] = stride;
    ++r.dims;
  }
  return r;
}

inline RowsTensor rows_tensor(const Tensor& x, void* data, const char* name) {
  return rows_tensor(x, data, name, x.dim() - 1);
}

inline void check(const RowsInputs& in) {
  const Tensor &s = in.student, &t = in.teacher;
  FASTKD_CHECK(s.dim() >= 1 && s.dim() == t.dim(), "student and teacher: the same shape [*, V] wanted");
  for (int64_t d = 0; d < s.dim(); ++d) {
    FASTKD_CHECK(s.size(d) == t.size(d), "student and teacher: the same shape [*, V] wanted");
  }
  FASTKD_CHECK(in.V() > 0, "student: at least one class wanted");
  for (const double T : {in.temperature, in.teacher_temperature}) {
    FASTKD_CHECK(T > 0 && std::isfinite(T), "temperature: a positive finite number wanted, got ", T);
  }
  FASTKD_CHECK(!in.normalizer || (*in.normalizer > 0 && std::isfinite(*in.normalizer)),
               "normalizer: a positive finite number wanted, got ", in.normalizer.value_or(0));
  FASTKD_CHECK(in.divergence >= 0 && in.divergence < int64_t(Divergence::kCount), "divergence: unknown number ",
               in.divergence);
  FASTKD_CHECK(Divergence(in.divergence) != Divergence::kJensenShannon || (in.parameter > 0 && in.parameter < 1),
               "parameter: a number between 0 and 1 wanted, got ", in.parameter);
  FASTKD_CHECK(in.reduction >= 0 && in.reduction <= int64_t(Reduction::kMean), "reduction: unknown number ",
               in.reduction);
}

}  // namespace fastkd
