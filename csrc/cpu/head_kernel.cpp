// The weights of adaptive_kl_div on the CPU: of each row the share of sum |p - q| that lies outside of the teacher's
// head; see math/head.h. Compiled once per instruction set.
//
// A row by itself: its maxima; e^(z - max) of both sides, in a workspace that stays in cache; and the bound of the
// head. A sample of the classes guesses where the bound lies, and floating-point sums of the mass above a few logits
// around it say whether it does. The whole masses then say which logit it is: so that the guess costs time alone. Last
// the differences on either side of the bound. Traffic: student and teacher, once each.
#include "cpu/head_kernel.h"

#include "cpu/head_bound.h"
#include "cpu/rows_lanes.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class T>
double weight_of(const RowsParams<T>& P, const HeadWorkspace<T>& W, int64_t row, Prefetch& ahead) {
  const double mu = P.parameter[row];
  if ((P.mask && !P.mask[row])) return 0.5;
  RowsStats stats{};
  T max_student = -kInf<T>, max_teacher = -kInf<T>;
  Sample<T> sample(P.V);
  walk(P, row, ahead, [&](int64_t first, const T* student, const T* teacher, int64_t n) {
    sample.take(first, teacher, n);
    const T s = maximum(student, n), t = maximum(teacher, n);
    max_student = s > max_student ? s : max_student;
    max_teacher = t > max_teacher ? t : max_teacher;
  });
  stats.max_student = double(finite_max(max_student));
  stats.max_teacher = double(finite_max(max_teacher));
  const Row<T> r = row_constants(P, row);
  // Less probable classes are no head's: all of them together are less than any tail.
  const double deepest = 1.001 * std::log(double(P.V) / (1 - mu > 1e-9 ? 1 - mu : 1e-9)) / r.inv_teacher_temperature;
  alignas(64) T difference[kChunk];  // of a chunk
  Ladder<T> ladder(T(stats.max_teacher), T(stats.max_teacher - deepest), sample, P.V, mu, r.scale_teacher);
  walk(P, row, ahead, [&](int64_t first, const T* student, const T* teacher, int64_t n) {
    first_pass_chunk<TotalVariation<T>>(student, teacher, n, r, stats, W.exp_student + first, W.exp_teacher + first,
                                        difference);
    ladder.add(teacher, W.exp_teacher + first, n);
  });
  const bool possible = stats.sum_student > 0 && stats.sum_student < kInf<double> && stats.sum_teacher > 0 &&
                        stats.sum_teacher < kInf<double>;
  if (!possible) return 0.5;  // the loss is 0, +inf or NaN whatever is said here
  if (mu == 1) return 0;
  const T bound = bound_of(P, W, row, stats.max_teacher, stats.sum_teacher, ladder, ahead);
  const Scale<T> k = block_scale<TotalVariation<T>>(r, row_scale<TotalVariation<T>>(r, stats), stats, stats);
  const T centre_student = T(centre_of(stats).student), centre_teacher = T(centre_of(stats).teacher), a = r.a, b = r.b;
  double head = 0, tail = 0;
  walk(P, row, ahead, [&](int64_t first, const T* student, const T* teacher, int64_t n) {
    const T *exp_student = W.exp_student + first, *exp_teacher = W.exp_teacher + first;
    T in_head = 0, in_tail = 0;
#pragma omp simd reduction(+ : in_head, in_tail)
    for (int64_t i = 0; i < n; ++i) {
      const T w = difference_of(student[i] - centre_student, teacher[i] - centre_teacher, a, b);
      const T of_class = element_loss(TotalVariation<T>(), exp_student[i], exp_teacher[i], w, k);
      in_head += teacher[i] > bound ? of_class : T(0);
      in_tail += teacher[i] > bound ? T(0) : of_class;
    }
    head += double(in_head);
    tail += double(in_tail);
  });
  return share_of_tail(head, tail);
}

template <class T>
void of_rows(const RowsParams<T>& P, void* memory, int64_t begin, int64_t end, double* weight) {
  const HeadWorkspace<T> W(memory, P.V);
  for (int64_t row = begin; row < end; ++row) {
    Prefetch ahead(P, row, end, 5);
    weight[row] = weight_of(P, W, row, ahead);
  }
}

// ---- a group of rows, lane by lane

// Where the bound of each row may lie.
template <class T>
struct Ranges {
  Lanes<T> least, largest;
  Lanes<uint64_t> limit;
};

// Exponentials take the place of the student's logits; the teacher's stand beside them. With what the search begins
// with: from the least logit to the largest below the best.
template <class T>
FASTKD_ONCE void exponentials(const RowsParams<T>& P, const FirstPass<T>& k, int64_t begin, int64_t n, int64_t lanes,
                              T* student, const T* teacher, T* exp_teacher, T* difference, Group& group,
                              Ranges<T>& ranges) {
  Lanes<T> part_student, part_teacher;
  Lanes<uint64_t> total;
  clear(lanes, part_student, part_teacher, total);
  for (int64_t i = 0; i < lanes; ++i) {
    ranges.least[i] = kInf<T>;
    ranges.largest[i] = -kInf<T>;
  }
  for (int64_t v = 0; v < P.V; ++v, student += lanes, teacher += lanes, exp_teacher += lanes, difference += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T s = student[i], t = teacher[i];
      const T e = k.template teacher<Given::kProbabilities>(i, t, part_teacher[i]);
      student[i] = k.template student<Given::kProbabilities>(i, s, part_student[i]);
      exp_teacher[i] = e;
      difference[i] = k.difference(i, s, t);
      total[i] += mass_of(e);
      const T below_best = t < k.max_teacher[i] ? t : -kInf<T>;
      ranges.least[i] = t < ranges.least[i] ? t : ranges.least[i];
      ranges.largest[i] = below_best > ranges.largest[i] ? below_best : ranges.largest[i];
    }
    if ((v + 1) % kAtOnce != 0 && v + 1 < P.V) continue;
    add_to(group.sum_student, part_student, lanes);
    add_to(group.sum_teacher, part_teacher, lanes);
  }
  for (int64_t i = 0; i < lanes; ++i) {
    ranges.limit[i] = mass_limit(P.parameter[begin + (i < n ? i : n - 1)], total[i]);
    const double student_sum = group.sum_student[i], teacher_sum = group.sum_teacher[i];
    const bool known = student_sum < kInf<double> && teacher_sum < kInf<double>;  // else there is a NaN
    if (!known || ranges.least[i] > ranges.largest[i]) ranges.least[i] = ranges.largest[i] = -kInf<T>;
  }
}

// One step of the search in all lanes; whether any is still open.
template <class T>
FASTKD_ONCE bool halve(int64_t V, int64_t lanes, const T* teacher, const T* exp_teacher, Ranges<T>& ranges) {
  Lanes<T> middle, least, largest;
  Lanes<uint64_t> above;
  clear(lanes, above);
  for (int64_t i = 0; i < lanes; ++i) {
    middle[i] = HeadRange<T>{ranges.least[i], ranges.largest[i]}.middle();
    least[i] = kInf<T>;
    largest[i] = -kInf<T>;
  }
  for (int64_t v = 0; v < V; ++v, teacher += lanes, exp_teacher += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T t = teacher[i], high_one = t > middle[i] ? t : kInf<T>, low_one = t > middle[i] ? -kInf<T> : t;
      above[i] += t > middle[i] ? mass_of(exp_teacher[i]) : 0;
      least[i] = high_one < least[i] ? high_one : least[i];
      largest[i] = low_one > largest[i] ? low_one : largest[i];
    }
  }
  bool open = false;
  for (int64_t i = 0; i < lanes; ++i) {
    HeadRange<T> range{ranges.least[i], ranges.largest[i]};
    if (!range.open()) continue;
    range.narrow(above[i], ranges.limit[i], least[i], largest[i]);
    ranges.least[i] = range.least;
    ranges.largest[i] = range.largest;
    open = open || range.open();
  }
  return open;
}

template <class T>
void of_lanes(const RowsParams<T>& P, void* memory, int64_t begin, int64_t end, double* weight) {
  const int64_t n = end - begin, lanes = padded(n), size = P.V * lanes;
  T *student = static_cast<T*>(memory), *teacher = student + size, *exp_teacher = teacher + size;
  T* difference = exp_teacher + size;
  Group group;
  FirstPass<T> first;
  SecondPass<T> second;
  Ranges<T> ranges;
  group.set_constants(P, begin, n, lanes);
  read(P, begin, n, lanes, student, teacher, group);
  first.set(group, lanes);
  exponentials(P, first, begin, n, lanes, student, teacher, exp_teacher, difference, group, ranges);
  second.template set<Given::kProbabilities>(group, lanes);
  bool open = true;
  while (open) open = halve(P.V, lanes, teacher, exp_teacher, ranges);
  Lanes<T> part_head, part_tail;
  Lanes<double> head, tail;
  clear(lanes, part_head, part_tail, head, tail);
  for (int64_t v = 0; v < P.V; ++v, student += lanes, teacher += lanes, exp_teacher += lanes, difference += lanes) {
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T of_class = element_loss(TotalVariation<T>(), student[i], exp_teacher[i], difference[i], second.at(i));
      part_head[i] += teacher[i] > ranges.least[i] ? of_class : T(0);
      part_tail[i] += teacher[i] > ranges.least[i] ? T(0) : of_class;
    }
    if ((v + 1) % kAtOnce != 0 && v + 1 < P.V) continue;
    add_to(head, part_head, lanes);
    add_to(tail, part_tail, lanes);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = begin + i;
    const bool possible = counts(P, row) && group.sum_student[i] > 0 && group.sum_teacher[i] > 0;
    weight[row] = !possible ? 0.5 : P.parameter[row] == 1 ? 0 : share_of_tail(head[i], tail[i]);
  }
}

template <class T>
const HeadKernel<T> kernel = {of_rows<T>, of_lanes<T>};

}  // namespace

template <class T>
const HeadKernel<T>& head_kernel() {
  return kernel<T>;
}
template const HeadKernel<float>& head_kernel<float>();
template const HeadKernel<double>& head_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
