// The rows schedule on the CPU for many rows at once: each lane of a vector has a row of its own. For rows of few
// classes, which would fill a vector badly and pay for their constants one by one; and for rows that lie side by side,
// as the pixels of maps [B, C, H, W] do whose classes are C. Compiled once per instruction set.
//
// The formulas are those of rows_kernel.cpp. A group of rows is read class by class into a workspace that stays in
// cache; there its maxima are found, the exponentials and differences take the logits' place, and the rest is written
// from them. No lane waits for another: a row's result does not depend on its neighbours', but for roundings of a hard
// loss where their temperatures differ. Rows of a group that differ in the divergence's parameter are computed row by
// row in its place, unless the divergence has a functor for that. Traffic: student + teacher + gradient, once each.
#include "cpu/rows_lanes.h"

#include "common/enum.h"

namespace fastkd::FASTKD_ISA {
namespace {

// The functor of each lane: one for all, or one each.
template <class D>
struct OneFunctor {
  D of;
  FASTKD_HD const D& operator[](int64_t) const { return of; }
};
template <class D>
struct FunctorOfLane {
  D of[kMostLanes];
  FASTKD_HD const D& operator[](int64_t i) const { return of[i]; }
};

// The divergence of rows that differ in its parameter, ends and all, where there is one for that.
template <class D>
struct OfAnyParameter {};
template <class T>
struct OfAnyParameter<SymmetricKL<T>> {
  struct type {
    T student, rest;
    FASTKD_HD type() {}
    FASTKD_HD explicit type(double parameter) : student(T(parameter)), rest(T(1 - parameter)) {}

    // what has no weight is left out, be it infinite
    FASTKD_HD T sum(T forward, T reverse) const {
      forward = rest == T(0) ? T(0) : rest * forward;
      return forward + (student == T(0) ? T(0) : student * reverse);
    }
    FASTKD_HD T loss(Element<T> e) const { return sum(ForwardKL<T>().loss(e), ReverseKL<T>().loss(e)); }
    FASTKD_HD T slope(Element<T> e) const { return sum(ForwardKL<T>().slope(e), ReverseKL<T>().slope(e)); }
  };
};
template <class D>
constexpr bool kAnyParameters = requires { typename OfAnyParameter<D>::type; };

// f(functors) of the rows begin .. begin + n.
template <class D, class T, class F>
void with_functors(const RowsParams<T>& P, int64_t begin, int64_t n, int64_t lanes, F&& f) {
  if constexpr (kAnyParameters<D>) {
    if (!one_parameter(P, begin, begin + n)) {
      using Of = typename OfAnyParameter<D>::type;
      FunctorOfLane<Of> functors;
      for (int64_t i = 0; i < lanes; ++i) {
        functors.of[i] = Of(P.parameter[begin + (i < n ? i : n - 1)]);
      }
      return f(functors);
    }
  }
  with_row_functor<D>(P.parameter[begin], P.second_parameter[begin],
                      [&](auto divergence) { f(OneFunctor<decltype(divergence)>{divergence}); });
}

struct LossSums {
  Lanes<double> loss, entropy, second;
};

// Exponentials take the place of the logits.
template <class T, bool kTeacherEntropy, Given kGiven>
FASTKD_ONCE void exponentials(const FirstPass<T>& k, int64_t V, int64_t lanes, T* student, T* teacher, T* difference,
                              Group& group, LossSums& sums) {
  Lanes<T> part_student, part_teacher, part_entropy;
  clear(lanes, part_student, part_teacher, part_entropy);
  for (int64_t v = 0; v < V; ++v, student += lanes, teacher += lanes, difference += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T s = student[i], t = teacher[i];
      student[i] = k.template student<kGiven>(i, s, part_student[i]);
      const T exp_teacher = k.template teacher<kGiven>(i, t, part_teacher[i]);
      teacher[i] = exp_teacher;
      difference[i] = k.difference(i, s, t);
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
template <class T, class D, class Functors>
void reduce(const Functors& functors, const SecondPass<T>& k, int64_t V, int64_t n, int64_t lanes, const T* student,
            const T* teacher, T* difference, Group& group, LossSums& sums, const GroupOf& of_grad, const Hard<T>* hard,
            const T* exp_hard) {
  Lanes<T> part_loss, part_slope, part_second, grad;
  clear(lanes, part_loss, part_slope, part_second);
  const bool write = D::kCentred && of_grad.first;
  for (int64_t v = 0; v < V; ++v, student += lanes, teacher += lanes, difference += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      part_loss[i] += element_loss(functors[i], student[i], teacher[i], difference[i], k.at(i));
      const T slope = element_slope(functors[i], student[i], teacher[i], difference[i], k.at(i));
      if constexpr (D::kCentred) {
        grad[i] = k.gradient(i, slope);
      } else {
        part_slope[i] += slope;
        part_second[i] += element_second(functors[i], student[i], teacher[i], difference[i], k.at(i));
        difference[i] = slope;
      }
    }
    if (write && hard) hard->add(v, lanes, student, exp_hard + v * lanes, grad.of);
    if (write) of_grad.store(v, n, grad.of);
    if ((v + 1) % kAtOnce != 0 && v + 1 < V) continue;
    add_to(sums.loss, part_loss, lanes);
    if constexpr (!D::kCentred) add_to(group.slope, part_slope, lanes);
    if constexpr (kTwoSums<D>) add_to(sums.second, part_second, lanes);
  }
}

template <Given kGiven, class T>
FASTKD_ONCE void gradient(const SecondPass<T>& k, int64_t V, int64_t n, int64_t lanes, const T* student, const T* slope,
                          const GroupOf& of_grad, const Hard<T>* hard, const T* exp_hard) {
  Lanes<T> grad;
  for (int64_t v = 0; v < V; ++v, student += lanes, slope += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) grad[i] = k.template gradient<kGiven>(i, slope[i], student[i]);
    if (hard) hard->add(v, lanes, student, exp_hard + v * lanes, grad.of);
    of_grad.store(v, n, grad.of);
  }
}

template <class D>
double loss_of(const LossSums& sums, const Group& group, int64_t i, TargetLoss with) {
  const double teacher = group.sum_teacher[i];
  if (teacher == 0) return 0;
  if (group.sum_student[i] == 0) return kInf<double>;
  if (D::kTeacherEntropy && with != TargetLoss::kDecoupled) {
    return sums.loss[i] + sums.entropy[i] * group.inv_teacher_temperature[i] / teacher + std::log(teacher);
  }
  if constexpr (kTwoSums<D>) return D::InDouble::row(sums.loss[i], sums.second[i]).loss;
  return sums.loss[i];
}

template <class T, class D>
void forward(const RowsParams<T>& P, void* memory, int64_t begin, int64_t end) {
  const int64_t n = end - begin, lanes = padded(n), size = P.V * lanes;
  T *student = static_cast<T*>(memory), *teacher = student + size, *difference = teacher + size;
  T* exp_hard = difference + size;
  Group group;
  Hard<T> of_hard;
  Hard<T>* hard = P.hard.target ? &of_hard : nullptr;
  FirstPass<T> first;
  SecondPass<T> second;
  LossSums sums;
  clear(lanes, sums.loss, sums.entropy, sums.second);
  group.set_constants(P, begin, n, lanes);
  constexpr Given kGiven = given<D>();
  if (hard) hard->set_targets(P, begin, n, lanes, kGiven == Given::kProbabilities);
  read(P, begin, n, lanes, student, teacher, group, kWithoutTarget<D> ? hard : nullptr);
  first.set(group, lanes);
  if (hard) hard->read_logits(P, lanes, student, exp_hard, group);
  if (kWithoutTarget<D> && P.hard.loss == TargetLoss::kNormalized) hard->read_teacher(P, lanes, teacher, group);
  exponentials<T, D::kTeacherEntropy, kGiven>(first, P.V, lanes, student, teacher, difference, group, sums);
  if (hard) {
    hard->read_exponentials(P, lanes, student, group);
    if constexpr (kWithoutTarget<D>) hard->set_factors(P, begin, n, group);
    hard->set_scales(P, begin, n, lanes, group);
  }
  for (int64_t i = 0; i < lanes && kGiven == Given::kLogOdds; ++i) group.sum_student[i] = group.sum_teacher[i] = 1;
  second.template set<kGiven>(group, lanes);
  for (int64_t i = 0; i < lanes; ++i) {
    second.keep(i, i < n && counts(P, begin + i) && !no_gradient(group.stats(i)) && !P.hard.without_soft());
  }
  const GroupOf of_grad(P.grad, begin);
  with_functors<D>(P, begin, n, lanes, [&](const auto& functors) {
    reduce<T, D>(functors, second, P.V, n, lanes, student, teacher, difference, group, sums, of_grad, hard, exp_hard);
  });
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = counts(P, begin + i);
    if (group.sum_teacher[i] == 0) group.slope[i] = 0;
    if (!D::kCentred && no_gradient(group.stats(i))) second.keep(i, false);
    second.slope[i] = T(group.slope[i]);
    if constexpr (kTwoSums<D>) {
      group.factor[i] = D::InDouble::row(sums.loss[i], sums.second[i]).factor;
      second.grad[i] = T(group.grad_scale[i] * group.factor[i]);
    }
    const double soft = loss_of<D>(sums, group, i, P.hard.loss);
    const double loss = hard && kept ? hard->loss(P, begin + i, i, group, soft) : soft * group.loss_scale[i];
    P.loss[begin + i] = kept ? T(loss) : T(0);
    if (P.stats) P.stats[begin + i] = kept ? group.stats(i) : RowsStats{};
  }
  if constexpr (!D::kCentred) {
    if (P.grad.data) gradient<kGiven, T>(second, P.V, n, lanes, student, difference, of_grad, hard, exp_hard);
  }
}

// From the statistics, class by class: nothing is kept between classes.
template <class T, class D>
void backward(const RowsParams<T>& P, int64_t begin, int64_t end) {
  const int64_t n = end - begin, lanes = padded(n);
  const GroupOf of_student(P.student, begin), of_teacher(P.teacher, begin), of_grad(P.grad, begin);
  Lanes<T> student_buffer, teacher_buffer, grad, exp_of_student, exp_hard;
  FirstPass<T> first;
  SecondPass<T> second;
  Group group;
  group.set_constants(P, begin, n, lanes);
  for (int64_t i = 0; i < lanes; ++i) {
    const int64_t row = begin + (i < n ? i : n - 1);
    group.set_stats(i, P.stats[row]);
    second.keep(i, counts(P, row) && !no_gradient(P.stats[row]) && !P.hard.without_soft());
  }
  constexpr Given kGiven = given<D>();
  first.set(group, lanes);
  second.template set<kGiven>(group, lanes);
  for (int64_t i = 0; i < lanes && kTwoSums<D>; ++i) second.grad[i] *= T(group.factor[i]);
  Hard<T> of_hard;
  Hard<T>* hard = P.hard.target ? &of_hard : nullptr;
  if (hard) {
    hard->set_targets(P, begin, n, lanes, kGiven == Given::kProbabilities);
    hard->set_scales(P, begin, n, lanes, group);
  }
  with_functors<D>(P, begin, n, lanes, [&](const auto& functors) {
    for (int64_t v = 0; v < P.V; ++v) {
      const T *s = of_student.load(v, n, student_buffer.of), *t = of_teacher.load(v, n, teacher_buffer.of);
      if constexpr (kWithoutTarget<D>) {
        s = hard->without(v, lanes, s, student_buffer.of, hard->logit);
        t = hard->without(v, lanes, t, teacher_buffer.of, hard->teacher_logit);
      }
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) {
        T sum = 0;  // which is known
        const T exp_student = first.template student<kGiven>(i, s[i], sum);
        const T exp_teacher = first.template teacher<kGiven>(i, t[i], sum);
        const T difference = first.difference(i, s[i], t[i]);
        const T slope = element_slope(functors[i], exp_student, exp_teacher, difference, second.at(i));
        grad[i] = D::kCentred ? second.gradient(i, slope) : second.template gradient<kGiven>(i, slope, exp_student);
        exp_of_student[i] = exp_student;
      }
      if (hard) {
        if (hard->power == 0) hard->exponentials(group, lanes, s, exp_hard.of);
        hard->add(v, lanes, exp_of_student.of, exp_hard.of, grad.of);
      }
      of_grad.store(v, n, grad.of);
    }
  });
}

template <class T, class D>
const RowsLanes<T> lanes = {forward<T, D>, backward<T, D>, kAnyParameters<D>};

}  // namespace

template <class T>
const RowsLanes<T>& rows_lanes(Divergence which) {
  return with_constant(which, [](auto k) -> const RowsLanes<T>& { return lanes<T, FunctorOf<k.value, T>>; });
}
template const RowsLanes<float>& rows_lanes<float>(Divergence);
template const RowsLanes<double>& rows_lanes<double>(Divergence);

}  // namespace fastkd::FASTKD_ISA
