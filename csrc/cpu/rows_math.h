// What the kernels of the rows schedule share on the CPU: the constants of a row, and the way from its sums to p, q, w
// and the gradient.
#pragma once
#include <cmath>
#include <type_traits>

#include "common/rows_params.h"
#include "cpu/memory.h"
#include "divergence_functors.h"
#include "math/two_classes.h"

namespace fastkd::FASTKD_ISA {
namespace {

// with_functor, and of a divergence that has it the simpler one: of a GPU's code it would be as much again.
template <class D, class F>
void with_row_functor(double parameter, double second, F&& f) {
  if constexpr (requires { typename D::Ascending; }) {
    if (second >= parameter) return f(typename D::Ascending(parameter, second));
  }
  with_functor<D>(parameter, second, f);
}

// Of temperatures that people distil with: powers cost less than exponentials, and as many roundings more.
inline constexpr int kMostHardPower = 4;

// The constants of a row.
template <class T>
struct Row {
  double inv_temperature, inv_teacher_temperature;
  double loss_scale;                 // T^2 weight soft_weight
  double grad_scale;                 // T^2 weight soft_weight upstream / divisor / T
  double hard_loss_scale;            // weight hard_weight; of a target that is parted see TargetLoss
  double hard_grad_scale;            // hard_loss_scale upstream / divisor, and / T if at T
  T scale_student, scale_teacher;    // log2(e) / T
  T lowest_student, lowest_teacher;  // below, the exponential is 0
  T a, b;                            // difference = (student - teacher) a + teacher b
  T a_teacher;                       // 1 / T_teacher
  int hard_power;                    // e^(z - max) is this power of e^((z - max) / T): T, if small and whole; else 0

  // Of a row whose target is parted from the others.
  void part(const RowsParams<T>& P, int64_t row, double temperature, double upstream) {
    loss_scale *= P.parameter[row];
    grad_scale *= P.parameter[row];
    if (P.hard.loss != TargetLoss::kDecoupled) return;
    hard_loss_scale *= (P.t_squared ? temperature * temperature : 1.0) * P.second_parameter[row];
    hard_grad_scale = hard_loss_scale * inv_temperature * upstream;
    hard_power = 1;
  }
};

inline int hard_power(double temperature) {
  int found = 0;
  for (int power = 1; power <= kMostHardPower; ++power) found = temperature == power ? power : found;
  return found;
}

template <class T>
Row<T> row_constants(const RowsParams<T>& P, int64_t row) {
  Row<T> r;
  const double temperature = P.temperature[row];
  r.inv_temperature = 1.0 / temperature;
  r.inv_teacher_temperature = 1.0 / P.teacher_temperature[row];
  const double weight = P.weight ? double(P.weight[row]) : 1.0;
  const double upstream = P.grad_scale * (P.upstream ? double(P.upstream[row * P.upstream_stride]) : 1.0);
  r.loss_scale = (P.t_squared ? temperature * temperature : 1.0) * weight * P.hard.soft_weight;
  r.grad_scale = r.loss_scale * r.inv_temperature * upstream;
  r.hard_loss_scale = weight * P.hard.hard_weight;
  r.hard_grad_scale = r.hard_loss_scale * upstream;
  r.scale_student = T(kLog2e<double> * r.inv_temperature);
  r.scale_teacher = T(kLog2e<double> * r.inv_teacher_temperature);
  r.lowest_student = exp2_lowest(r.scale_student);
  r.lowest_teacher = exp2_lowest(r.scale_teacher);
  r.a = T(r.inv_temperature);
  r.b = T(r.inv_temperature - r.inv_teacher_temperature);
  r.a_teacher = T(r.inv_teacher_temperature);
  r.hard_power = hard_power(temperature);
  if (P.hard.parted()) r.part(P, row, temperature, upstream);
  return r;
}

// f(a constant, 1 for 0), with the power of a row.
template <class F>
void with_hard_power(int power, F&& f) {
  static_assert(kMostHardPower == 4);
  switch (power) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    default:
      return f(std::integral_constant<int, 1>());
  }
}

template <int kPower, class T>
FASTKD_HD T power_of(T x) {
  if constexpr (kPower == 1) return x;
  if constexpr (kPower == 2) return x * x;
  if constexpr (kPower == 3) return x * x * x;
  if constexpr (kPower == 4) return (x * x) * (x * x);
}

template <class T>
T finite_max(T m) {  // of -inf alone: anything finite will do, every exponential is 0
  return m == -kInf<T> ? T(0) : m;
}

// Where student and teacher differ by a constant, which changes nothing, the difference would be
// rounded at the size of that constant: there both are taken from their maxima. Where they do not,
// s - t itself is the most exact, and near convergence it is what counts.
struct Centre {
  double student, teacher;
};
inline Centre centre_of(const RowsStats& stats) {
  const double shift = stats.max_student - stats.max_teacher;
  return shift > 4 || shift < -4 ? Centre{stats.max_student, stats.max_teacher} : Centre{0, 0};
}

// student / T - teacher / T_teacher, of logits that are taken from their centres. A teacher's -inf
// makes s - t what it should be, and must not meet b = 0 or a b > 0.
template <class T>
FASTKD_HD T difference_of(T s, T t, T a, T b) {
  const T lowest = T(-1e30);
  return (s - t) * a + (t > lowest ? t : lowest) * b;
}

inline double rebase(double max, double max_row, double inv_temperature) {
  return max == max_row ? 1.0 : std::exp((max - max_row) * inv_temperature);
}

// From exponentials and difference to p, q and w, and to the gradient. Of divergences that are given logarithms p and q
// are those of a factor, which are added.
template <class T>
struct Scale {
  T p, q, offset, slope, grad;
};

template <class D, class T>
Scale<double> row_scale(const Row<T>& r, const RowsStats& stats) {
  if (given<D>() == Given::kLogOdds) return {0, 0, 0, 0, r.grad_scale};
  const bool possible = stats.sum_student != 0;  // else: -inf alone, p = 0, w = -inf, a loss of +inf
  Scale<double> k;
  k.p = possible ? 1 / stats.sum_student : 0;
  k.q = 1 / stats.sum_teacher;
  // log sum e^(student / T) - log sum e^(teacher / T_teacher), from differences that are exact
  // where the two agree
  k.offset = possible ? (stats.max_student - stats.max_teacher) * r.inv_temperature +
                            stats.max_teacher * (r.inv_temperature - r.inv_teacher_temperature) +
                            std::log(stats.sum_student / stats.sum_teacher)
                      : 0;
  k.slope = stats.slope;
  k.grad = possible ? r.grad_scale : 0;  // no finite step makes such a row possible
  if (kTwoSums<D>) k.grad *= stats.factor;
  if (given<D>() == Given::kLogs) {
    k.p = possible ? -std::log(stats.sum_student) : 0;
    k.q = -std::log(stats.sum_teacher);
  }
  return k;
}

// The row's scale for one of its blocks, which has maxima and centres of its own.
template <class D, class T>
Scale<T> block_scale(const Row<T>& r, const Scale<double>& k, const RowsStats& row, const RowsStats& own) {
  const Centre centre = centre_of(own);
  const double moved = (centre.student - centre.teacher) * r.inv_temperature +
                       centre.teacher * (r.inv_temperature - r.inv_teacher_temperature);
  if (given<D>() != Given::kProbabilities) {
    const double p = k.p + (own.max_student - row.max_student) * r.inv_temperature;
    const double q = k.q + (own.max_teacher - row.max_teacher) * r.inv_teacher_temperature;
    const bool logs = given<D>() == Given::kLogs;
    return {T(logs ? p : 0), T(logs ? q : 0), T(k.offset - moved), T(k.slope), T(k.grad)};
  }
  // a block of -inf alone has no maximum to rebase from
  const double p = own.sum_student == 0 ? 0 : k.p * rebase(own.max_student, row.max_student, r.inv_temperature);
  const double q = own.sum_teacher == 0 ? 0 : k.q * rebase(own.max_teacher, row.max_teacher, r.inv_teacher_temperature);
  return {T(p), T(q), T(k.offset - moved), T(k.slope), T(k.grad)};
}

// What a row's sums leave out where its target is parted from the others: the logits of the target, and the teacher's
// sum of e^(z - max) at temperature 1.
struct Parted {
  double logit, teacher_logit, sum_teacher;
};

template <class T>
TargetPart<double> target_part(const RowsParams<T>& P, const Row<T>& r, const RowsStats& row, const Parted& k) {
  if (row.sum_teacher == 0 && k.teacher_logit == -kInf<double>) return {0, 0};
  if (row.sum_student == 0 && k.logit == -kInf<double>) return {kInf<double>, 0};
  const double nan = kInf<double> - kInf<double>;
  const double logit = k.logit < kInf<double> ? k.logit : nan;
  const double teacher_logit = k.teacher_logit < kInf<double> ? k.teacher_logit : nan;
  const bool decoupled = P.hard.loss == TargetLoss::kDecoupled;
  const double inv = decoupled ? r.inv_temperature : 1, inv_teacher = decoupled ? r.inv_teacher_temperature : 1;
  const double sum = decoupled ? row.sum_student : row.sum_hard;
  const double sum_teacher = decoupled ? row.sum_teacher : k.sum_teacher;
  const double a = (logit - row.max_student) * inv - std::log(sum);
  const double b = (teacher_logit - row.max_teacher) * inv_teacher - std::log(sum_teacher);
  const double of_logits = (logit - teacher_logit) * inv + teacher_logit * (inv - inv_teacher);
  const double of_sums =
      (row.max_student - row.max_teacher) * inv + row.max_teacher * (inv - inv_teacher) + std::log(sum / sum_teacher);
  return TargetPart<double>::of(decoupled, a, b, of_logits - of_sums);
}

// A row's loss with what its target adds. A part of weight 0 is left out, however large it is.
template <class T>
double parted_loss(const RowsParams<T>& P, const Row<T>& r, const RowsStats& row, const Parted& k, double soft) {
  const double hard = r.hard_loss_scale == 0 ? 0 : target_part(P, r, row, k).loss * r.hard_loss_scale;
  return hard + (r.loss_scale == 0 ? 0 : soft * r.loss_scale);
}

// From e^(z - max) of a block to what the hard loss adds to the gradient: p - smoothing / V of every class, and of the
// target less 1 - smoothing. Of a target that is parted from the others: p times the factor, and less it.
template <class T>
struct HardScale {
  T p, everywhere, target;
};

template <class T>
HardScale<T> hard_scale(const RowsParams<T>& P, const Row<T>& r, const RowsStats& row, const RowsStats& own) {
  if (P.hard.loss == TargetLoss::kDecoupled) {
    if (row.sum_student == 0) return {};
    const double scale = r.hard_grad_scale * row.factor;
    const double p = own.sum_student == 0 ? 0 : rebase(own.max_student, row.max_student, r.inv_temperature);
    return {T(scale / row.sum_student * p), T(0), T(scale)};
  }
  if (row.sum_hard == 0) return {};  // of -inf alone: no finite step makes a class possible
  const double scale = r.hard_grad_scale * (P.hard.parted() ? row.factor : 1), smoothing = P.hard.smoothing;
  const double p = own.sum_hard == 0 ? 0 : scale / row.sum_hard * rebase(own.max_student, row.max_student, 1.0);
  return {T(p), T(scale * smoothing / P.hard.classes), T(scale * (1 - smoothing))};
}

// The cross-entropy of a row, from its sum and maximum, the target's logit and the sum of all z - max.
template <class T>
double hard_loss(const RowsParams<T>& P, const RowsStats& row, double logit, double logits) {
  if (row.sum_hard == 0) return kInf<double>;
  const double smoothing = P.hard.smoothing;
  double loss = std::log(row.sum_hard);
  if (smoothing < 1) loss += (1 - smoothing) * (row.max_student - logit);
  if (smoothing > 0) loss -= smoothing * logits / double(P.V);
  return loss;
}

// Not inside the loops: a struct that is declared there, GCC keeps in memory, lane by lane.
template <Given kGiven, class T>
FASTKD_HD Element<T> element(T exp_student, T exp_teacher, T difference, Scale<T> k) {
  if constexpr (kGiven == Given::kProbabilities) return {exp_student * k.p, exp_teacher * k.q, difference - k.offset};
  return {exp_student + k.p, exp_teacher + k.q, difference - k.offset};
}
template <Given kGiven, class T>
FASTKD_HD T probability(T exp_student, T scale) {
  if constexpr (kGiven == Given::kProbabilities) return exp_student * scale;
  return exp2_scaled(exp_student + scale, kLog2e<T>, exp2_lowest(kLog2e<T>));
}
// What the first pass keeps of a logit: its exponential, whose sum it adds to; or the logarithm of that, or the log
// odds.
template <Given kGiven, class T>
FASTKD_HD T kept_of(T z, T max, T scale, T lowest, T inv_temperature, T& sum) {
  if constexpr (kGiven == Given::kLogOdds) return z * inv_temperature;
  const T exponential = exp2_scaled(z - max, scale, lowest);
  sum += exponential;
  return kGiven == Given::kLogs ? (z - max) * inv_temperature : exponential;
}
template <class T, class D>
FASTKD_HD T element_loss(D divergence, T exp_student, T exp_teacher, T difference, Scale<T> k) {
  return divergence.loss(element<given<D>()>(exp_student, exp_teacher, difference, k));
}
template <class T, class D>
FASTKD_HD T element_slope(D divergence, T exp_student, T exp_teacher, T difference, Scale<T> k) {
  return divergence.slope(element<given<D>()>(exp_student, exp_teacher, difference, k));
}

template <class T, class D>
FASTKD_HD T element_second(D divergence, T exp_student, T exp_teacher, T difference, Scale<T> k) {
  if constexpr (kTwoSums<D>) return divergence.second(element<given<D>()>(exp_student, exp_teacher, difference, k));
  return T(0);
}

// Powers are taken of exponentials, where there are any.
template <class D, class T>
int power_of_row(const Row<T>& r) {
  return given<D>() == Given::kProbabilities ? r.hard_power : 0;
}

// What a row's temperature multiplies its divergence by.
template <class T>
double squared(const RowsParams<T>& P, int64_t row) {
  return P.t_squared ? P.temperature[row] * P.temperature[row] : 1.0;
}

// A row that has no gradient: a side without a possible class, or an infinite loss whose slopes
// have no finite sum.
inline bool no_gradient(const RowsStats& stats) {
  return stats.sum_teacher == 0 || stats.sum_student == 0 || stats.slope == kInf<double>;
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
