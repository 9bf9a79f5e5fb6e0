// The ops of the rows schedule, once for every device. A device is a class that has
//   Device(student)                  makes the student's device the current one
//   lies_with(x, student)            whether a tensor is where the student is
//   kName                            of that place, in messages
//   kValuesAtHand                    whether the host may read tensors without waiting
//   forward(P, loss, per_row)        runs the schedule; loss: [] where not per_row
//   backward(P)                      the gradient from P.stats
//   statistics(P)                    P.stats of some of a row's classes
//   sums(P)                          P.sums from P.stats, and the gradient where it is known by then
//   inverse_divisor(in)              see fastkd/_calls.py
#pragma once
#include "common/rows_inputs.h"
#include "common/rows_params.h"

namespace fastkd {

template <class T>
inline constexpr ScalarType kScalarType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

template <class Device>
struct RowsOps {
  static bool lies_dense(const Tensor& x, const RowsCall& in, int64_t numel, ScalarType type) {
    return Device::lies_with(x, in.student) && x.scalar_type() == type && x.numel() == numel && x.is_contiguous();
  }

  // One element per row, or null where there is no tensor.
  template <class T>
  static const T* per_row(const OptionalTensor& x, const RowsCall& in, ScalarType type, const char* name) {
    if (!x) return nullptr;
    FASTKD_CHECK(lies_dense(*x, in, number_of_rows(in), type), name, ": a contiguous tensor ", Device::kName,
                 " with one element of the right dtype per row wanted");
    return static_cast<const T*>(x->const_data_ptr());
  }

  // A number of a call. Its values are looked at where the host can.
  template <class T, class Allowed>
  static Number<T> number(double of_all, const OptionalTensor& rows, const RowsCall& in, const char* name,
                          const char* wanted, Allowed&& allowed) {
    const bool one = rows && rows->dim() == 0;
    FASTKD_CHECK(!one || lies_dense(*rows, in, 1, kScalarType<T>), name, ": a tensor ", Device::kName,
                 " of the right dtype wanted");
    const Number<T> x = one ? Number<T>{static_cast<const T*>(rows->const_data_ptr()), 0, of_all}
                            : Number<T>{per_row<T>(rows, in, kScalarType<T>, name), 1, of_all};
    const int64_t values = !x.memory ? 1 : !Device::kValuesAtHand ? 0 : one ? 1 : number_of_rows(in);
    for (int64_t row = 0; row < values; ++row)
      FASTKD_CHECK(allowed(x[row]), name, ": ", wanted, " wanted, got ", x[row]);
    return x;
  }
  template <class T>
  static Number<T> temperature(double of_all, const OptionalTensor& rows, const RowsCall& in, const char* name) {
    return number<T>(of_all, rows, in, name, "a positive finite number",
                     [](double x) { return x > 0 && std::isfinite(x); });
  }

  static Number<double> parameter(double of_all, const OptionalTensor& rows, const RowsCall& in,
                                  const ParameterRange& range) {
    return number<double>(of_all, rows, in, range.name, range.wanted,
                          [&range](double x) { return x >= range.low && x <= range.high; });
  }

  // Targets out of range are an error where the host can look, and NaN where it cannot.
  static HardTargets hard_targets(const RowsCall& in, const bool* mask) {
    if (!in.target) return {};
    const int64_t V = classes(in);
    HardTargets hard{per_row<int64_t>(in.target, in, ScalarType::Long, "target"), TargetLoss(in.target_loss)};
    hard.classes = double(V);
    if (hard.parted()) {
      hard.hard_weight = 1;
    } else {
      numbers_of(in, hard);
    }
    for (int64_t row = 0; Device::kValuesAtHand && row < number_of_rows(in); ++row) {
      FASTKD_CHECK((mask && !mask[row]) || hard.is_class(hard.target[row], V), "target: classes from 0 to ", V - 1,
                   " wanted, got ", hard.target[row]);
    }
    return hard;
  }

  static void numbers_of(const RowsCall& in, HardTargets& hard) {
    const OptionalTensor& numbers = in.target_numbers;
    FASTKD_CHECK(numbers && numbers->is_cpu() && numbers->scalar_type() == ScalarType::Double &&
                     (numbers->numel() == 3 || numbers->numel() == 4) && numbers->is_contiguous(),
                 "target_numbers: three numbers or four in float64 on the CPU wanted");
    const double* number = static_cast<const double*>(numbers->const_data_ptr());
    const auto weight = [](const char* name, double x) {
      FASTKD_CHECK(x >= 0 && std::isfinite(x), name, ": a finite number of at least 0 wanted, got ", x);
    };
    weight("hard_weight", number[0]);
    weight("soft_weight", number[1]);
    FASTKD_CHECK(number[2] >= 0 && number[2] <= 1, "label_smoothing: a number from 0 to 1 wanted, got ", number[2]);
    hard.hard_weight = number[0];
    hard.soft_weight = number[1];
    hard.smoothing = number[2];
    if (numbers->numel() == 4) hard.classes = number[3];
    FASTKD_CHECK(hard.classes >= double(classes(in)), "target_numbers: classes in all, not fewer than there are here, ",
                 "wanted, got ", hard.classes);
  }

  static void check_grad(const Tensor& grad, const RowsCall& in) {
    const Tensor& s = in.student;
    bool same = Device::lies_with(grad, s) && grad.scalar_type() == s.scalar_type() && grad.dim() == s.dim();
    for (int64_t d = 0; same && d < s.dim(); ++d) same = grad.size(d) == s.size(d);
    FASTKD_CHECK(same, "grad: a tensor of the student's shape and dtype ", Device::kName, " wanted");
  }

  static RowsStats* stats_data(const Tensor& stats, const RowsCall& in) {
    constexpr int64_t kSize = sizeof(RowsStats) / sizeof(double);
    FASTKD_CHECK(lies_dense(stats, in, kSize * number_of_rows(in), ScalarType::Double),
                 "stats: a contiguous float64 tensor ", Device::kName, " with ", kSize, " elements per row wanted");
    return static_cast<RowsStats*>(const_cast<void*>(stats.const_data_ptr()));
  }

  static RowParts* parts_data(const Tensor& parts, const RowsCall& in) {
    constexpr int64_t kSize = sizeof(RowParts) / sizeof(double);
    FASTKD_CHECK(in.target && in.target_loss == 0, "parts: of a loss with a target and a hard part alone");
    FASTKD_CHECK(lies_dense(parts, in, kSize * number_of_rows(in), ScalarType::Double),
                 "parts: a contiguous float64 tensor ", Device::kName, " with ", kSize, " elements per row wanted");
    return static_cast<RowParts*>(const_cast<void*>(parts.const_data_ptr()));
  }

  template <class T>
  static RowsParams<T> params(const RowsCall& in, const OptionalTensor& grad) {
    RowsParams<T> P{};
    constexpr ScalarType kType = kScalarType<T>;
    P.divergence = Divergence(in.divergence);
    const auto* ranges = in.target_loss == 0 ? kParameterRanges[in.divergence] : kTargetLossRanges[in.target_loss - 1];
    P.parameter = parameter(in.parameter, in.parameter_rows, in, ranges[0]);
    P.second_parameter = parameter(in.second_parameter, in.second_parameter_rows, in, ranges[1]);
    P.N = number_of_rows(in);
    P.V = classes(in);
    P.student = rows_tensor(in.student, const_cast<void*>(in.student.const_data_ptr()), "student");
    P.teacher = rows_tensor(in.teacher, const_cast<void*>(in.teacher.const_data_ptr()), "teacher");
    if (grad) P.grad = rows_tensor(*grad, grad->mutable_data_ptr(), "grad");
    P.temperature = temperature<T>(in.temperature, in.temperature_rows, in, "temperature");
    P.teacher_temperature =
        temperature<T>(in.teacher_temperature, in.teacher_temperature_rows, in, "teacher_temperature");
    P.t_squared = in.t_squared;
    P.mask = per_row<bool>(in.mask, in, ScalarType::Bool, "mask");
    P.weight = per_row<T>(in.weight, in, kType, "weight");
    P.hard = hard_targets(in, P.mask);
    P.grad_scale = in.scale;
    if (in.scale_tensor) {
      FASTKD_CHECK(lies_dense(*in.scale_tensor, in, 1, ScalarType::Double), "scale_tensor: one float64 element ",
                   Device::kName, " wanted");
      P.scale = static_cast<const double*>(in.scale_tensor->const_data_ptr());
    }
    return P;
  }

  static void check_all(const RowsCall& in) {
    FASTKD_CHECK(Device::lies_with(in.teacher, in.student), "teacher: a tensor ", Device::kName, " wanted");
    check(in);
  }

  static void forward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = RowsCall::read(arguments);
    forward(in, RowsForward::read(arguments));
  }

  static void forward(const RowsCall& in, const RowsForward& out) {
    check_all(in);
    const bool per_row = out.loss.dim() > 0;
    FASTKD_CHECK(lies_dense(out.loss, in, per_row ? number_of_rows(in) : 1, computed_in(in)),
                 "loss: a contiguous tensor ", Device::kName,
                 " of the dtype that is computed in wanted, [] or one element per row");
    if (out.grad) check_grad(*out.grad, in);
    dispatch_compute(computed_in(in), [&](auto t) {
      using T = decltype(t);
      const Device device(in.student);
      RowsParams<T> P = params<T>(in, out.grad);
      if (out.stats) P.stats = stats_data(*out.stats, in);
      if (out.parts) P.parts = parts_data(*out.parts, in);
      FASTKD_CHECK(!in.target || P.hard.classes == double(P.V), "target_numbers: three wanted of whole rows");
      device.forward(P, out.loss, per_row);
    });
  }

  static void backward(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = RowsCall::read(arguments);
    const auto rest = RowsBackward::read(arguments);
    check_all(in);
    check_grad(rest.grad, in);
    const int64_t N = number_of_rows(in), numel = rest.upstream.numel();
    FASTKD_CHECK((numel == 1 || numel == N) && lies_dense(rest.upstream, in, numel, computed_in(in)),
                 "upstream: a contiguous tensor ", Device::kName,
                 " of the dtype that is computed in wanted, with one element, or one per row");
    dispatch_compute(computed_in(in), [&](auto t) {
      using T = decltype(t);
      const Device device(in.student);
      RowsParams<T> P = params<T>(in, rest.grad);
      P.stats = stats_data(rest.stats, in);
      P.upstream = static_cast<const T*>(rest.upstream.const_data_ptr());
      P.upstream_stride = numel == 1 ? 0 : 1;
      if (N > 0) device.backward(P);
    });
  }

  static void statistics(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = RowsCall::read(arguments);
    const auto out = RowsStatistics::read(arguments);
    check_phase(in);
    dispatch_compute(computed_in(in), [&](auto t) {
      using T = decltype(t);
      const Device device(in.student);
      RowsParams<T> P = params<T>(in, {});
      P.stats = stats_data(out.stats, in);
      if (P.N > 0) device.statistics(P);
    });
  }

  static void sums(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = RowsCall::read(arguments);
    const auto rest = RowsSums::read(arguments);
    check_phase(in);
    if (rest.grad) check_grad(*rest.grad, in);
    FASTKD_CHECK(lies_dense(rest.sums, in, 3 * number_of_rows(in), ScalarType::Double),
                 "sums: a contiguous float64 tensor ", Device::kName, " with 3 elements per row wanted");
    dispatch_compute(computed_in(in), [&](auto t) {
      using T = decltype(t);
      const Device device(in.student);
      RowsParams<T> P = params<T>(in, rest.grad);
      P.stats = stats_data(rest.stats, in);
      P.sums = static_cast<RowSums*>(rest.sums.mutable_data_ptr());
      if (P.N > 0) device.sums(P);
    });
  }

  static void check_phase(const RowsCall& in) {
    check_all(in);
    FASTKD_CHECK(in.target_loss == 0, "target_loss: a phase by itself is not there for targets that are parted");
  }

  static void inverse_divisor(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(stack);
    const auto in = InverseDivisor::read(arguments);
    const auto dense = [&](const Tensor& x, int64_t numel, bool type) {
      return Device::lies_with(x, in.scale) && type && x.numel() == numel && x.is_contiguous();
    };
    FASTKD_CHECK(dense(in.scale, 1, in.scale.scalar_type() == ScalarType::Double), "scale: one float64 element ",
                 Device::kName, " wanted");
    FASTKD_CHECK(!in.mask || dense(*in.mask, in.rows, in.mask->scalar_type() == ScalarType::Bool),
                 "mask: a contiguous bool tensor ", Device::kName, " with one element per row wanted");
    if (!in.normalizer) return Device::template inverse_divisor<float>(in);
    const ScalarType type = in.normalizer->scalar_type();
    FASTKD_CHECK(dense(*in.normalizer, 1, type == ScalarType::Float || type == ScalarType::Double),
                 "normalizer: one element of float32 or float64 ", Device::kName, " wanted");
    dispatch_compute(type, [&](auto t) { Device::template inverse_divisor<decltype(t)>(in); });
  }
};

}  // namespace fastkd
