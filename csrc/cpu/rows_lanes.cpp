// The rows schedule on the CPU for many rows at once: each lane of a vector has a row of its own. For rows of few
// classes, which would fill a vector badly and pay for their constants one by one; and for rows that lie side by side,
// as the pixels of maps [B, C, H, W] do whose classes are C. Compiled once per instruction set.
//
// The formulas are those of rows_kernel.cpp. A group of rows is read class by class into a workspace that stays in
// cache; there its maxima are found, the exponentials and differences take the logits' place, and the rest is written
// from them. No lane waits for another: a row's result does not depend on its neighbours'. Rows of a group that
// differ in the divergence's parameter are computed row by row in its place.
// Traffic: student + teacher + gradient, once each.
#include <type_traits>

#include "common/enum.h"
#include "cpu/rows_kernel.h"
#include "cpu/rows_math.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Of what is the same for every divergence: compiled once, not into each. A call of it has a whole group's work.
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
  Lanes<double> inv_temperature, inv_teacher_temperature, loss_scale, grad_scale;
  Lanes<double> max_student, sum_student, max_teacher, sum_teacher, slope;

  template <class T>
  FASTKD_ONCE void set_constants(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes) {
    const bool t_squared = P.t_squared;
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
      loss_scale[i] *= t_squared ? temperature * temperature : 1.0;
      grad_scale[i] *= loss_scale[i] * inv_temperature[i];
      sum_student[i] = sum_teacher[i] = slope[i] = 0;
    }
  }
  RowsStats stats(int64_t i) const {
    return {max_student[i], sum_student[i], max_teacher[i], sum_teacher[i], slope[i], 0};
  }
  void set_stats(int64_t i, const RowsStats& k) {
    max_student[i] = k.max_student;
    sum_student[i] = k.sum_student;
    max_teacher[i] = k.max_teacher;
    sum_teacher[i] = k.sum_teacher;
    slope[i] = k.slope;
  }
};

// See centre_of.
FASTKD_HD bool apart(double shift) { return (shift > 4) | (shift < -4); }

// What a lane needs on the way from logits to exponentials and difference.
template <class T>
struct FirstPass {
  Lanes<T> max_student, max_teacher, centre_student, centre_teacher;
  Lanes<T> scale_student, scale_teacher, lowest_student, lowest_teacher, a, b;

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
    }
  }
  FASTKD_HD T exp_student(int64_t i, T s) const {
    return exp2_scaled(s - max_student[i], scale_student[i], lowest_student[i]);
  }
  FASTKD_HD T exp_teacher(int64_t i, T t) const {
    return exp2_scaled(t - max_teacher[i], scale_teacher[i], lowest_teacher[i]);
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
  }
  void keep(int64_t i, bool has_gradient) { kept[i] = has_gradient ? ~Bits<T>(0) : Bits<T>(0); }
  FASTKD_HD Scale<T> at(int64_t i) const { return {p[i], q[i], offset[i], slope[i], grad[i]}; }
  FASTKD_HD T gradient(int64_t i, T centred_slope) const {
    return bits_as<T>(bits_as<Bits<T>>(centred_slope * grad[i]) & kept[i]);
  }
  FASTKD_HD T gradient(int64_t i, T slope_of_class, T exp_student) const {
    return gradient(i, slope_of_class - exp_student * p[i] * slope[i]);
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

// The logits of a group come to lie at student and teacher, [V, lanes]; their maxima in the constants.
template <class T>
FASTKD_ONCE void read(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes, T* student, T* teacher,
                      Group& group) {
  const GroupOf of_student(P.student, begin), of_teacher(P.teacher, begin);
  Lanes<T> max_student, max_teacher;
  for (int64_t i = 0; i < lanes; ++i) max_student[i] = max_teacher[i] = -kInf<T>;
  for (int64_t v = 0; v < P.V; ++v, student += lanes, teacher += lanes) {
    const T *s = of_student.load(v, n, student), *t = of_teacher.load(v, n, teacher);
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

struct LossSums {
  Lanes<double> loss, entropy;
};

// Exponentials take the place of the logits.
template <class T, bool kTeacherEntropy>
FASTKD_ONCE void exponentials(const FirstPass<T>& k, int64_t V, int64_t lanes, T* student, T* teacher, T* difference,
                              Group& group, LossSums& sums) {
  Lanes<T> part_student, part_teacher, part_entropy;
  clear(lanes, part_student, part_teacher, part_entropy);
  for (int64_t v = 0; v < V; ++v, student += lanes, teacher += lanes, difference += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T s = student[i], t = teacher[i], exp_student = k.exp_student(i, s), exp_teacher = k.exp_teacher(i, t);
      student[i] = exp_student;
      teacher[i] = exp_teacher;
      difference[i] = k.difference(i, s, t);
      part_student[i] += exp_student;
      part_teacher[i] += exp_teacher;
      if constexpr (kTeacherEntropy) {
        part_entropy[i] += exp_teacher == T(0) ? T(0) : exp_teacher * (k.max_teacher[i] - t);
      }
    }
    if ((v + 1) % kAtOnce != 0 && v + 1 < V) continue;
    add_to(group.sum_student, part_student, lanes);
    add_to(group.sum_teacher, part_teacher, lanes);
    if constexpr (kTeacherEntropy) add_to(sums.entropy, part_entropy, lanes);
  }
}

// Sums the loss; writes the gradient where the slopes add up to 0, else leaves them in the place of the difference.
template <class T, class D>
void reduce(D divergence, const SecondPass<T>& k, int64_t V, int64_t n, int64_t lanes, const T* student,
            const T* teacher, T* difference, Group& group, LossSums& sums, const GroupOf& of_grad) {
  Lanes<T> part_loss, part_slope, grad;
  clear(lanes, part_loss, part_slope);
  const bool write = D::kCentred && of_grad.first;
  for (int64_t v = 0; v < V; ++v, student += lanes, teacher += lanes, difference += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      part_loss[i] += element_loss(divergence, student[i], teacher[i], difference[i], k.at(i));
      const T slope = element_slope(divergence, student[i], teacher[i], difference[i], k.at(i));
      if constexpr (D::kCentred) {
        grad[i] = k.gradient(i, slope);
      } else {
        part_slope[i] += slope;
        difference[i] = slope;
      }
    }
    if (write) of_grad.store(v, n, grad.of);
    if ((v + 1) % kAtOnce != 0 && v + 1 < V) continue;
    add_to(sums.loss, part_loss, lanes);
    if constexpr (!D::kCentred) add_to(group.slope, part_slope, lanes);
  }
}

template <class T>
FASTKD_ONCE void gradient(const SecondPass<T>& k, int64_t V, int64_t n, int64_t lanes, const T* student, const T* slope,
                          const GroupOf& of_grad) {
  Lanes<T> grad;
  for (int64_t v = 0; v < V; ++v, student += lanes, slope += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) grad[i] = k.gradient(i, slope[i], student[i]);
    of_grad.store(v, n, grad.of);
  }
}

template <class D>
double loss_of(const LossSums& sums, const Group& group, int64_t i) {
  const double teacher = group.sum_teacher[i];
  if (teacher == 0) return 0;
  if (group.sum_student[i] == 0) return kInf<double>;
  if constexpr (D::kTeacherEntropy) {
    return sums.loss[i] + sums.entropy[i] * group.inv_teacher_temperature[i] / teacher + std::log(teacher);
  }
  return sums.loss[i];
}

template <class T, class D>
void forward(const RowsParams<T>& P, void* memory, int64_t begin, int64_t end) {
  const int64_t n = end - begin, lanes = padded(n), size = P.V * lanes;
  T *student = static_cast<T*>(memory), *teacher = student + size, *difference = teacher + size;
  Group group;
  FirstPass<T> first;
  SecondPass<T> second;
  LossSums sums;
  clear(lanes, sums.loss, sums.entropy);
  group.set_constants(P, begin, n, lanes);
  read(P, begin, n, lanes, student, teacher, group);
  first.set(group, lanes);
  exponentials<T, D::kTeacherEntropy>(first, P.V, lanes, student, teacher, difference, group, sums);
  second.set(group, lanes);
  for (int64_t i = 0; i < lanes; ++i) {
    second.keep(i, i < n && counts(P, begin + i) && !no_gradient(group.stats(i)));
  }
  const GroupOf of_grad(P.grad, begin);
  with_functor<D>(P.parameter[begin], [&](auto divergence) {
    reduce(divergence, second, P.V, n, lanes, student, teacher, difference, group, sums, of_grad);
  });
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = counts(P, begin + i);
    if (group.sum_teacher[i] == 0) group.slope[i] = 0;
    if (!D::kCentred && no_gradient(group.stats(i))) second.keep(i, false);
    second.slope[i] = T(group.slope[i]);
    P.loss[begin + i] = kept ? T(loss_of<D>(sums, group, i) * group.loss_scale[i]) : T(0);
    if (P.stats) P.stats[begin + i] = kept ? group.stats(i) : RowsStats{};
  }
  if constexpr (!D::kCentred) {
    if (P.grad.data) gradient(second, P.V, n, lanes, student, difference, of_grad);
  }
}

// From the statistics, class by class: nothing is kept between classes.
template <class T, class D>
void backward(const RowsParams<T>& P, int64_t begin, int64_t end) {
  const int64_t n = end - begin, lanes = padded(n);
  const GroupOf of_student(P.student, begin), of_teacher(P.teacher, begin), of_grad(P.grad, begin);
  Lanes<T> student_buffer, teacher_buffer, grad;
  FirstPass<T> first;
  SecondPass<T> second;
  Group group;
  group.set_constants(P, begin, n, lanes);
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t row = begin + (i < n ? i : n - 1);
    group.set_stats(i, P.stats[row]);
    second.keep(i, counts(P, row) && !no_gradient(P.stats[row]));
  }
  first.set(group, lanes);
  second.set(group, lanes);
  with_functor<D>(P.parameter[begin], [&](auto divergence) {
    for (int64_t v = 0; v < P.V; ++v) {
      const T *s = of_student.load(v, n, student_buffer.of), *t = of_teacher.load(v, n, teacher_buffer.of);
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        const T exp_student = first.exp_student(i, s[i]), exp_teacher = first.exp_teacher(i, t[i]);
        const T difference = first.difference(i, s[i], t[i]);
        const T slope = element_slope(divergence, exp_student, exp_teacher, difference, second.at(i));
        grad[i] = second.gradient(i, slope, exp_student);
      }
      of_grad.store(v, n, grad.of);
    }
  });
}

template <class T, class D>
const RowsLanes<T> lanes = {forward<T, D>, backward<T, D>};

}  // namespace

template <class T>
const RowsLanes<T>& rows_lanes(Divergence which) {
  return with_constant(which, [](auto k) -> const RowsLanes<T>& { return lanes<T, FunctorOf<k.value, T>>; });
}
template const RowsLanes<float>& rows_lanes<float>(Divergence);
template const RowsLanes<double>& rows_lanes<double>(Divergence);

}  // namespace fastkd::FASTKD_ISA
