// The weights of adaptive_kl_div on the CPU: of each row the share of sum |p - q| that lies outside of the teacher's
// head; see math/head.h. Compiled once per instruction set.
//
// A row by itself: its maxima; e^(z - max) of both sides, in a workspace that stays in cache; and the bound of the
// head. A sample of the classes guesses where the bound lies, and floating-point sums of the mass above a few logits
// around it say whether it does. The whole masses then say which logit it is: so that the guess costs time alone. Last
// the differences on either side of the bound. Traffic: student and teacher, once each.
#include "cpu/head_kernel.h"

#include "cpu/prefetch.h"
#include "cpu/rows_chunks.h"
#include "cpu/rows_lanes.h"
#include "math/head.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class T>
using Mass = Bits<T>;

template <class T>
struct HeadWorkspace {
  T *exp_student, *exp_teacher;
  T* logits;  // of classes that may be the bound
  Mass<T>* masses;

  HeadWorkspace(void* memory, int64_t V) {
    const int64_t size = rows_blocks(V) * kRowsBlock;
    exp_student = static_cast<T*>(memory);
    exp_teacher = exp_student + size;
    logits = exp_teacher + size;
    masses = reinterpret_cast<Mass<T>*>(logits + size);
  }
};

// visit(first class, student, teacher, classes padded to whole vectors) of all chunks of a row.
template <class T, class Visit>
void walk(const RowsParams<T>& P, int64_t row, Prefetch& ahead, Visit&& visit) {
  alignas(64) T student_buffer[kChunk], teacher_buffer[kChunk];
  const char *student = P.student.row(row), *teacher = P.teacher.row(row);
  for (int64_t first = 0; first < P.V; first += kChunk) {
    const int64_t n = P.V - first < kChunk ? P.V - first : kChunk;
    visit(first, load_block(P.student, student, first, n, student_buffer),
          load_block(P.teacher, teacher, first, n, teacher_buffer), padded(n));
    ahead.some();
  }
}
// The same of the teacher alone.
template <class T, class Visit>
void walk_teacher(const RowsParams<T>& P, int64_t row, Prefetch& ahead, Visit&& visit) {
  alignas(64) T buffer[kChunk];
  const char* teacher = P.teacher.row(row);
  for (int64_t first = 0; first < P.V; first += kChunk) {
    const int64_t n = P.V - first < kChunk ? P.V - first : kChunk;
    visit(first, load_block(P.teacher, teacher, first, n, buffer), padded(n));
    ahead.some();
  }
}

// Some of a row's classes, evenly spaced.
template <class T>
struct Sample {
  static constexpr int64_t kMost = 1024;
  const int64_t V, step;
  int64_t next, count = 0;
  alignas(64) T logits[kMost], mass[kMost];

  explicit Sample(int64_t V) : V(V), step((V + kMost - 1) / kMost), next(step / 2) {}
  // Of the classes first .. first + n.
  void take(int64_t first, const T* x, int64_t n) {
    const int64_t end = first + n < V ? first + n : V;  // n may have been padded
    for (; next < end; next += step) logits[count++] = x[next - first];
  }
};

// Logits from high to low between which the bound lies, and what lies above each.
constexpr int kSteps = 4;
template <class T>
struct Ladder {
  T at[kSteps + 2];
  double above[kSteps + 2] = {};

  Ladder(T high, T low) {
    for (int i = 0; i <= kSteps; ++i) at[i] = high - (high - low) * (T(i) / T(kSteps + 1));
    at[kSteps + 1] = low;
  }
  // Around where the share mu of the mass lies above, by a sample and by how far one like it may be off. The best
  // class, at high, is known: in the sample it would stand for many.
  Ladder(T high, T low, Sample<T>& sample, int64_t V, double mu, T scale) : Ladder(high, low) {
    constexpr int kBins = 256;
    const T lowest = exp2_lowest(scale), width = (high - low) / T(kBins);
#pragma omp simd
    for (int64_t i = 0; i < sample.count; ++i) {
      sample.mass[i] = exp2_scaled(sample.logits[i] - high, scale, lowest);
    }
    const double of_best = double(sample.count) / double(V);
    double bins[kBins] = {of_best}, sum = of_best, squares = 0;
    for (int64_t i = 0; i < sample.count; ++i) {
      const T below = (high - sample.logits[i]) / width;
      const double mass = below > T(0) ? double(sample.mass[i]) : 0;
      bins[below < T(kBins) && below > T(0) ? int(below) : kBins - 1] += mass;
      sum += mass;
      squares += mass * mass;
    }
    const double deviation = std::sqrt(mu * (1 - mu) * squares);
    const double wanted[] = {mu * sum - 4 * deviation, mu * sum - 1.5 * deviation, mu * sum + 1.5 * deviation,
                             mu * sum + 4 * deviation};
    double above_bin = 0;  // and in it
    int rung = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      above_bin += bins[bin];
      for (; rung < kSteps && above_bin > wanted[rung]; ++rung) {
        at[rung + 1] = high - width * T(rung < kSteps / 2 ? bin : bin + 1);
      }
    }
    for (; rung < kSteps; ++rung) at[rung + 1] = low;
  }
  void add(const T* teacher, const T* exp_teacher, int64_t n) {
    static_assert(kSteps == 4);
    const T at1 = at[1], at2 = at[2], at3 = at[3], at4 = at[4];
    T sum1 = 0, sum2 = 0, sum3 = 0, sum4 = 0;
#pragma omp simd reduction(+ : sum1, sum2, sum3, sum4)
    for (int64_t i = 0; i < n; ++i) {
      sum1 += teacher[i] > at1 ? exp_teacher[i] : T(0);
      sum2 += teacher[i] > at2 ? exp_teacher[i] : T(0);
      sum3 += teacher[i] > at3 ? exp_teacher[i] : T(0);
      sum4 += teacher[i] > at4 ? exp_teacher[i] : T(0);
    }
    above[1] += double(sum1);
    above[2] += double(sum2);
    above[3] += double(sum3);
    above[4] += double(sum4);
  }
  // The first rung above which there is more than the limit: the bound is between it and the one before.
  int passed(double limit) const {
    int i = 1;
    while (i <= kSteps && above[i] <= limit) ++i;
    return i;
  }
};

// A bit for each of 16 classes: low < x <= high.
template <class T>
uint32_t between(const T* x, T low, T high) {
  uint32_t bits = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m512 v = _mm512_loadu_ps(x);
    const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_set1_ps(low), _CMP_GT_OQ);
    return _mm512_mask_cmp_ps_mask(above, v, _mm512_set1_ps(high), _CMP_LE_OQ);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kLanes; i += 8) {
      const __m256 v = _mm256_loadu_ps(x + i);
      const __m256 above = _mm256_cmp_ps(v, _mm256_set1_ps(low), _CMP_GT_OQ);
      const __m256 below = _mm256_cmp_ps(v, _mm256_set1_ps(high), _CMP_LE_OQ);
      bits |= uint32_t(_mm256_movemask_ps(_mm256_and_ps(above, below))) << i;
    }
    return bits;
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < kLanes; i += 4) {
      const __m128 v = _mm_loadu_ps(x + i);
      const __m128 inside = _mm_and_ps(_mm_cmpgt_ps(v, _mm_set1_ps(low)), _mm_cmple_ps(v, _mm_set1_ps(high)));
      bits |= uint32_t(_mm_movemask_ps(inside)) << i;
    }
    return bits;
  }
#endif
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t((x[i] > low) & (x[i] <= high)) << i;
  return bits;
}

// Whole masses are added up in two parts where T is float: no lane of 32 bits overflows.
template <class T>
inline constexpr int kLowBits = sizeof(T) == 4 ? 15 : 40;

// Those of a chunk, of all classes and of those above high.
template <class T>
void add_masses(const T* teacher, const T* exp_teacher, int64_t n, T high, uint64_t& total, uint64_t& above) {
  constexpr int kBits = kLowBits<T>;
  constexpr Mass<T> kLow = (Mass<T>(1) << kBits) - 1;
  Mass<T> low = 0, rest = 0, above_low = 0, above_rest = 0;
#pragma omp simd reduction(+ : low, rest, above_low, above_rest)
  for (int64_t i = 0; i < n; ++i) {
    const Mass<T> mass = mass_of(exp_teacher[i]), counts = teacher[i] > high ? ~Mass<T>(0) : 0;
    low += mass & kLow;
    rest += mass >> kBits;
    above_low += mass & kLow & counts;
    above_rest += (mass >> kBits) & counts;
  }
  total += (uint64_t(rest) << kBits) + low;
  above += (uint64_t(above_rest) << kBits) + above_low;
}

// What whole masses say of a row, with the classes from low to high, which may be the bound, in the workspace.
template <class T>
struct Gathered {
  T high;
  uint64_t total = 0, above = 0, inside = 0;
  int64_t count = 0;  // inside
};

template <class T>
Gathered<T> gather(const RowsParams<T>& P, const HeadWorkspace<T>& W, int64_t row, T high, T low, Prefetch& ahead) {
  Gathered<T> found{high};
  walk_teacher(P, row, ahead, [&](int64_t first, const T* teacher, int64_t n) {
    const T* exp_teacher = W.exp_teacher + first;
    add_masses(teacher, exp_teacher, n, high, found.total, found.above);
    for (int64_t i = 0; i < n; i += kLanes) {
      for (uint32_t bits = between(teacher + i, low, high); bits; bits &= bits - 1) {
        const int64_t at = i + __builtin_ctz(bits);
        W.logits[found.count] = teacher[at];
        W.masses[found.count++] = mass_of(exp_teacher[at]);
      }
    }
  });
  for (int64_t i = 0; i < found.count; ++i) found.inside += W.masses[i];
  return found;
}

// Of some classes the mass above a logit, the least logit there, and the largest of the others.
template <class T>
struct Halves {
  uint64_t above;
  T least, largest;
};

template <class T>
Halves<T> halves_of(const T* logits, const Mass<T>* masses, int64_t n, T middle) {
  Halves<T> found{0, kInf<T>, -kInf<T>};
  constexpr int64_t kAtOnce = 16384;
  constexpr int kBits = kLowBits<T>;
  constexpr Mass<T> kLow = (Mass<T>(1) << kBits) - 1;
  for (int64_t first = 0; first < n; first += kAtOnce) {
    const int64_t end = n - first < kAtOnce ? n : first + kAtOnce;
    Mass<T> low = 0, rest = 0;
    T least = kInf<T>, largest = -kInf<T>;
#pragma omp simd reduction(+ : low, rest) reduction(min : least) reduction(max : largest)
    for (int64_t i = first; i < end; ++i) {
      const T x = logits[i], high_one = x > middle ? x : kInf<T>, low_one = x > middle ? -kInf<T> : x;
      const Mass<T> mass = masses[i] & (x > middle ? ~Mass<T>(0) : 0);
      low += mass & kLow;
      rest += mass >> kBits;
      least = high_one < least ? high_one : least;
      largest = low_one > largest ? low_one : largest;
    }
    found.above += (uint64_t(rest) << kBits) + low;
    found.least = least < found.least ? least : found.least;
    found.largest = largest > found.largest ? largest : found.largest;
  }
  return found;
}

// Among the classes that were gathered, by halves: those above them have no more than the limit, or are the best; those
// above and these have more. Where there are none, any logit below those above will do. Of every half that cannot have
// the bound nothing is kept.
template <class T>
T bound_among(const HeadWorkspace<T>& W, const Gathered<T>& found, uint64_t limit) {
  if (found.count == 0) return found.high;
  T* const logits = W.logits;
  Mass<T>* const masses = W.masses;
  HeadRange<T> range{logits[0], logits[0]};
  for (int64_t i = 1; i < found.count; ++i) {
    range.least = logits[i] < range.least ? logits[i] : range.least;
    range.largest = logits[i] > range.largest ? logits[i] : range.largest;
  }
  int64_t count = found.count;
  uint64_t above_all = found.above;
  while (range.open()) {
    const T middle = range.middle();
    const Halves<T> found_here = halves_of(logits, masses, count, middle);
    const uint64_t above = above_all + found_here.above;
    const bool higher = range.narrow(above, limit, found_here.least, found_here.largest);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool keep = (logits[i] > middle) == higher;
      logits[kept] = logits[i];
      masses[kept] = masses[i];
      kept += keep;
    }
    count = kept;
    above_all = higher ? above_all : above;
  }
  return range.least;
}

inline float next_below(float x) { return nextafterf(x, -kInf<float>); }
inline double next_below(double x) { return nextafter(x, -kInf<double>); }

// The bound of the head where it is not of all classes: of a row whose exponentials are there. ladder: what lies above
// the rungs of the first guess. Where the bound is not near it, more of them close in on it by steps of equal length.
template <class T>
T bound_of(const RowsParams<T>& P, const HeadWorkspace<T>& W, int64_t row, double max, double sum, Ladder<T> ladder,
           Prefetch& ahead) {
  const double mu = P.parameter[row];
  int passed = ladder.passed(mu * sum);
  const bool near = passed > 1 && passed <= kSteps;
  for (int round = near ? 2 : 0; round < 2; ++round) {
    ladder = Ladder<T>(ladder.at[passed - 1], ladder.at[passed]);
    walk_teacher(P, row, ahead,
                 [&](int64_t first, const T* teacher, int64_t n) { ladder.add(teacher, W.exp_teacher + first, n); });
    passed = ladder.passed(mu * sum);
  }
  const T below_best = next_below(T(max));
  const T high = ladder.at[passed - 1] < below_best ? ladder.at[passed - 1] : below_best;
  Gathered<T> found = gather(P, W, row, high, ladder.at[passed], ahead);
  const uint64_t limit = mass_limit(mu, found.total);
  const bool too_low = high < below_best && found.above > limit;
  if (too_low || found.above + found.inside <= limit) found = gather(P, W, row, below_best, -kInf<T>, ahead);
  return bound_among(W, found, limit);
}

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
