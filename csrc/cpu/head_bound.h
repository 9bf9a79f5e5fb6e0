// The bound of the teacher's head in a row, on the CPU: see head_kernel.cpp.
#pragma once
#include <cmath>

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

}  // namespace
}  // namespace fastkd::FASTKD_ISA
