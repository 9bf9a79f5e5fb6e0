// What a group of rows is made of that are computed together, each in a lane of its own: their places in memory, their
// constants, the steps from logits to the gradient, and their hard loss. See rows_lanes.cpp.
#pragma once
#include <cstring>
#include <type_traits>

#include "cpu/rows_kernel.h"
#include "cpu/rows_math.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Marks functions that do not depend on the divergence, so that they are not inlined into every one. A call handles one
// class of all rows of a group, or more.
#define FASTKD_ONCE __attribute__((noinline))

// Classes that are added up in T; what they add up to in double.
constexpr int64_t kAtOnce = 32;

// A value of each row of a group.
template <class T>
struct alignas(64) Lanes {
  T of[kMostLanes];
  FASTKD_HD T& operator[](int64_t lane) { return of[lane]; }
  FASTKD_HD const T& operator[](int64_t lane) const { return of[lane]; }
};

template <class... L>
void clear(int64_t lanes, L&... of) {
  (std::memset(of.of, 0, size_t(lanes) * sizeof(of.of[0])), ...);
}

// The rows begin .. end of a tensor, one step apart.
struct GroupOf {
  RowsTensor classes;  // with the step from row to row in the place of that from class to class
  char* first;
  int64_t step;  // bytes from class to class

  GroupOf(const RowsTensor& x, int64_t begin) : classes(x) {
    first = x.data ? x.row(begin) : nullptr;
    step = x.stride_v * x.element_size;
    classes.stride_v = x.dims > 0 ? x.stride[x.dims - 1] : 1;
  }
  template <class T>
  FASTKD_ONCE const T* load(int64_t v, int64_t n, T* buffer) const {
    return load_block(classes, first + v * step, 0, n, buffer);
  }
  template <class T>
  FASTKD_ONCE void store(int64_t v, int64_t n, const T* values) const {
    store_block(classes, first + v * step, 0, n, values, false);
  }
};

// The constants of a group's rows and what is summed over their classes, lane by lane; see Row and RowsStats. What
// fills the last vector is computed as the last row is, of logits of -inf, and not kept.
struct Group {
  Lanes<double> inv_temperature, inv_teacher_temperature, loss_scale, grad_scale, hard_grad_scale;
  Lanes<double> max_student, sum_student, max_teacher, sum_teacher, slope, sum_hard, factor;

  template <class T>
  FASTKD_ONCE void set_constants(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes) {
    const bool t_squared = P.t_squared;
    const HardTargets hard = P.hard;
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t row = begin + (i < n ? i : n - 1);
      inv_temperature[i] = P.temperature[row];
      inv_teacher_temperature[i] = P.teacher_temperature[row];
      loss_scale[i] = P.weight ? double(P.weight[row]) : 1.0;
      grad_scale[i] = P.grad_scale * (P.upstream ? double(P.upstream[row * P.upstream_stride]) : 1.0);
    }
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const double temperature = inv_temperature[i];
      inv_temperature[i] = 1 / temperature;
      inv_teacher_temperature[i] = 1 / inv_teacher_temperature[i];
      hard_grad_scale[i] = grad_scale[i] * loss_scale[i] * hard.hard_weight;
      loss_scale[i] *= (t_squared ? temperature * temperature : 1.0) * hard.soft_weight;
      grad_scale[i] *= loss_scale[i] * inv_temperature[i];
      sum_student[i] = sum_teacher[i] = slope[i] = sum_hard[i] = factor[i] = 0;
    }
    if (!hard.parted()) return;
    for (int64_t i = 0; i < lanes; ++i) {
      const Row<T> r = row_constants(P, begin + (i < n ? i : n - 1));
      loss_scale[i] = r.loss_scale;
      grad_scale[i] = r.grad_scale;
      hard_grad_scale[i] = r.hard_grad_scale;
    }
  }
  RowsStats stats(int64_t i) const {
    return {max_student[i], sum_student[i], max_teacher[i], sum_teacher[i], slope[i], sum_hard[i], factor[i]};
  }
  void set_stats(int64_t i, const RowsStats& k) {
    max_student[i] = k.max_student;
    sum_student[i] = k.sum_student;
    max_teacher[i] = k.max_teacher;
    sum_teacher[i] = k.sum_teacher;
    slope[i] = k.slope;
    sum_hard[i] = k.sum_hard;
    factor[i] = k.factor;
  }
};

// See centre_of.
FASTKD_HD bool apart(double shift) { return (shift > 4) | (shift < -4); }

// What a lane needs on the way from logits to exponentials and difference.
template <class T>
struct FirstPass {
  Lanes<T> max_student, max_teacher, centre_student, centre_teacher;
  Lanes<T> scale_student, scale_teacher, lowest_student, lowest_teacher, a, b, a_teacher;

  FASTKD_ONCE void set(const Group& group, int64_t lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const double student = group.max_student[i], teacher = group.max_teacher[i];
      max_student[i] = T(student);
      max_teacher[i] = T(teacher);
      centre_student[i] = T(apart(student - teacher) ? student : 0.0);
      centre_teacher[i] = T(apart(student - teacher) ? teacher : 0.0);
      scale_student[i] = T(kLog2e<double> * group.inv_temperature[i]);
      scale_teacher[i] = T(kLog2e<double> * group.inv_teacher_temperature[i]);
      lowest_student[i] = exp2_lowest(scale_student[i]);
      lowest_teacher[i] = exp2_lowest(scale_teacher[i]);
      a[i] = T(group.inv_temperature[i]);
      b[i] = T(group.inv_temperature[i] - group.inv_teacher_temperature[i]);
      a_teacher[i] = T(group.inv_teacher_temperature[i]);
    }
  }
  // See kept_of.
  template <Given kGiven>
  FASTKD_HD T student(int64_t i, T s, T& sum) const {
    return kept_of<kGiven>(s, max_student[i], scale_student[i], lowest_student[i], a[i], sum);
  }
  template <Given kGiven>
  FASTKD_HD T teacher(int64_t i, T t, T& sum) const {
    return kept_of<kGiven>(t, max_teacher[i], scale_teacher[i], lowest_teacher[i], a_teacher[i], sum);
  }
  FASTKD_HD T difference(int64_t i, T s, T t) const {
    return difference_of(s - centre_student[i], t - centre_teacher[i], a[i], b[i]);
  }
};

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// What it needs from there to p, q, w and the gradient: see row_scale.
template <class T>
struct SecondPass {
  Lanes<T> p, q, offset, slope, grad;
  Lanes<Bits<T>> kept;  // which bits of the gradient: all, or none where it is 0 whatever comes out. Of a condition in
                        // its place GCC makes masked stores, which the loads that follow wait for.

  template <Given kGiven>
  FASTKD_ONCE void set(const Group& group, int64_t lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const double student = group.sum_student[i], teacher = group.sum_teacher[i];
      const double shift = group.max_student[i] - group.max_teacher[i], inv = group.inv_temperature[i];
      const double of_centres = shift * inv + group.max_teacher[i] * (inv - group.inv_teacher_temperature[i]);
      const double of_sums = log_ratio(student, teacher, student - teacher).log;
      p[i] = T(student == 0 ? 0.0 : 1 / student);
      q[i] = T(teacher == 0 ? 0.0 : 1 / teacher);
      offset[i] = T((apart(shift) ? 0.0 : of_centres) + of_sums);
      slope[i] = T(group.slope[i]);
      grad[i] = T(group.grad_scale[i]);
    }
    if constexpr (kGiven == Given::kProbabilities) return;
    for (int64_t i = 0; i < lanes; ++i) {
      const bool logs = kGiven == Given::kLogs;
      p[i] = T(logs && group.sum_student[i] != 0 ? -std::log(group.sum_student[i]) : 0);
      q[i] = T(logs && group.sum_teacher[i] != 0 ? -std::log(group.sum_teacher[i]) : 0);
      if (!logs) {
        const double shift = group.max_student[i] - group.max_teacher[i], inv = group.inv_temperature[i];
        const double of_centres = shift * inv + group.max_teacher[i] * (inv - group.inv_teacher_temperature[i]);
        offset[i] = T(apart(shift) ? -of_centres : 0.0);
      }
    }
  }
  void keep(int64_t i, bool has_gradient) { kept[i] = has_gradient ? ~Bits<T>(0) : Bits<T>(0); }
  FASTKD_HD Scale<T> at(int64_t i) const { return {p[i], q[i], offset[i], slope[i], grad[i]}; }
  FASTKD_HD T gradient(int64_t i, T centred_slope) const {
    return bits_as<T>(bits_as<Bits<T>>(centred_slope * grad[i]) & kept[i]);
  }
  template <Given kGiven>
  FASTKD_HD T gradient(int64_t i, T slope_of_class, T exp_student) const {
    return gradient(i, slope_of_class - probability<kGiven>(exp_student, p[i]) * slope[i]);
  }
};

template <class T>
bool counts(const RowsParams<T>& P, int64_t row) {
  return !P.mask || P.mask[row];
}

template <class T>
void add_to(Lanes<double>& sums, Lanes<T>& part, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    sums[i] += double(part[i]);
    part[i] = 0;
  }
}

// The hard loss of a group's rows: their targets, and what makes a gradient of e^(z - max); see HardScale.
template <class T>
struct Hard {
  int power;  // see Row; 0 where the group's rows have several temperatures
  Lanes<T> p, everywhere, of_target;
  Lanes<Bits<T>> target, kept;
  Lanes<double> logit, logits, teacher_logit, sum_teacher;  // see Parted

  // powers: whether exponentials are kept.
  FASTKD_ONCE void set_targets(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes, bool powers) {
    power = powers ? row_constants(P, begin).hard_power : 0;
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t row = begin + (i < n ? i : n - 1);
      target[i] = counts(P, row) ? Bits<T>(P.hard.target[row]) : Bits<T>(0);
      power = P.temperature[row] == P.temperature[begin] || P.hard.loss == TargetLoss::kDecoupled ? power : 0;
      logit[i] = logits[i] = teacher_logit[i] = sum_teacher[i] = 0;
    }
  }
  // One side's class v without the rows whose target it is, whose logits are kept.
  FASTKD_ONCE const T* without(int64_t v, int64_t lanes, const T* x, T* memory, Lanes<double>& of_target) const {
    for (int64_t i = 0; i < lanes; ++i) {
      const bool out = target[i] == Bits<T>(v);
      of_target[i] = out ? double(x[i]) : of_target[i];
      memory[i] = out ? -kInf<T> : x[i];
    }
    return memory;
  }
  // The teacher's sums at temperature 1.
  FASTKD_ONCE void read_teacher(const RowsParams<T>& P, int64_t lanes, const T* teacher, const Group& group) {
    const T scale = kLog2e<T>, lowest = exp2_lowest(scale);
    Lanes<T> part;
    clear(lanes, part);
    for (int64_t v = 0; v < P.V; ++v, teacher += lanes) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        part[i] += exp2_scaled(teacher[i] - T(group.max_teacher[i]), scale, lowest);
      }
      if ((v + 1) % kAtOnce == 0 || v + 1 == P.V) add_to(sum_teacher, part, lanes);
    }
  }
  Parted parted(int64_t i) const { return {logit[i], teacher_logit[i], sum_teacher[i]}; }
  FASTKD_ONCE void set_factors(const RowsParams<T>& P, int64_t begin, int64_t n, Group& group) const {
    for (int64_t i = 0; i < n; ++i) {
      group.factor[i] = target_part(P, row_constants(P, begin + i), group.stats(i), parted(i)).factor;
    }
  }
  // From logits: what they sum up to, and, where the exponentials are no powers of others, these as well.
  FASTKD_ONCE void read_logits(const RowsParams<T>& P, int64_t lanes, const T* student, T* exp_hard, Group& group) {
    for (int64_t i = 0; i < lanes && !P.hard.parted(); ++i) logit[i] = double(student[int64_t(target[i]) * lanes + i]);
    Lanes<T> part, part_logits;
    clear(lanes, part, part_logits);
    for (int64_t v = 0; v < P.V; ++v, student += lanes, exp_hard += lanes) {
      if (power == 0) {
        exponentials(group, lanes, student, exp_hard);
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) part[i] += exp_hard[i];
      }
      if (P.hard.smoothing != 0) add_up(lanes, student, group, part_logits);
      if ((v + 1) % kAtOnce != 0 && v + 1 < P.V) continue;
      add_to(group.sum_hard, part, lanes);
      add_to(logits, part_logits, lanes);
    }
  }
  FASTKD_ONCE void exponentials(const Group& group, int64_t lanes, const T* student, T* exp_hard) const {
    const T scale = kLog2e<T>, lowest = exp2_lowest(scale);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      exp_hard[i] = exp2_scaled(student[i] - T(group.max_student[i]), scale, lowest);
    }
  }
  // z - max: see logits_chunk.
  static void add_up(int64_t lanes, const T* student, const Group& group, Lanes<T>& part) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) part[i] += student[i] - T(group.max_student[i]);
  }
  // Adds up e^(z - max) as powers of the exponentials at temperature T.
  FASTKD_ONCE void read_exponentials(const RowsParams<T>& P, int64_t lanes, const T* exp_student, Group& group) const {
    if (power == 0) return;
    Lanes<T> part;
    clear(lanes, part);
    with_hard_power(power, [&](auto k) {
      for (int64_t v = 0; v < P.V; ++v, exp_student += lanes) {
#pragma omp simd
        for (int64_t i = 0; i < lanes; ++i) part[i] += power_of<k.value>(exp_student[i]);
        if ((v + 1) % kAtOnce == 0 || v + 1 == P.V) add_to(group.sum_hard, part, lanes);
      }
    });
  }
  FASTKD_ONCE void set_scales(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes, const Group& group) {
    for (int64_t i = 0; i < lanes; ++i) {
      const double sum = group.sum_hard[i], scale = group.hard_grad_scale[i] * (P.hard.parted() ? group.factor[i] : 1);
      p[i] = T(scale / sum);
      everywhere[i] = T(scale * P.hard.smoothing / P.hard.classes);
      of_target[i] = T(scale * (1 - P.hard.smoothing));
      kept[i] = i < n && counts(P, begin + i) && sum != 0 ? ~Bits<T>(0) : Bits<T>(0);
    }
  }
  // Adds to the gradient of class v.
  FASTKD_ONCE void add(int64_t v, int64_t lanes, const T* exp_student, const T* exp_hard, T* grad) const {
    const T* of = power > 0 ? exp_student : exp_hard;
    with_hard_power(power, [&](auto k) {
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        const T less = target[i] == Bits<T>(v) ? of_target[i] + everywhere[i] : everywhere[i];
        grad[i] += bits_as<T>(bits_as<Bits<T>>(power_of<k.value>(of[i]) * p[i] - less) & kept[i]);
      }
    });
  }
  // The row's loss, of which the divergence is known.
  double loss(const RowsParams<T>& P, int64_t row, int64_t i, const Group& group, double soft) const {
    if (P.hard.parted()) return parted_loss(P, row_constants(P, row), group.stats(i), parted(i), soft);
    if (P.parts) {
      P.parts[row].soft = soft * squared(P, row);
      P.parts[row].hard = hard_loss(P, group.stats(i), logit[i], logits[i]);
    }
    return (P.hard.without_soft() ? 0 : soft * group.loss_scale[i]) + hard_part(P, row, i, group);
  }

 private:
  double hard_part(const RowsParams<T>& P, int64_t row, int64_t i, const Group& group) const {
    if (P.hard.hard_weight == 0) return 0;  // leaves out what may be infinite
    return hard_loss(P, group.stats(i), logit[i], logits[i]) * row_constants(P, row).hard_loss_scale;
  }
};

// The logits of a group come to lie at student and teacher, [V, lanes]; their maxima in the constants.
template <class T>
FASTKD_ONCE void read(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes, T* student, T* teacher,
                      Group& group, Hard<T>* parted = nullptr) {
  const GroupOf of_student(P.student, begin), of_teacher(P.teacher, begin);
  Lanes<T> max_student, max_teacher;
  for (int64_t i = 0; i < lanes; ++i) max_student[i] = max_teacher[i] = -kInf<T>;
  for (int64_t v = 0; v < P.V; ++v, student += lanes, teacher += lanes) {
    const T *s = of_student.load(v, n, student), *t = of_teacher.load(v, n, teacher);
    if (parted) {
      s = parted->without(v, lanes, s, student, parted->logit);
      t = parted->without(v, lanes, t, teacher, parted->teacher_logit);
    }
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      student[i] = s[i];
      teacher[i] = t[i];
      max_student[i] = s[i] > max_student[i] ? s[i] : max_student[i];
      max_teacher[i] = t[i] > max_teacher[i] ? t[i] : max_teacher[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < lanes; ++i) {
    group.max_student[i] = double(finite_max(max_student[i]));
    group.max_teacher[i] = double(finite_max(max_teacher[i]));
  }
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
