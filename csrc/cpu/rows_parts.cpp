// Entropies of student and teacher, and whether their best class is the same: what is told of a row besides its loss,
// where the rows schedule does not have their exponentials. Compiled once per instruction set. A row is read for its
// maxima, and from cache for its sums; the rows schedule then finds it there. With e = e^((z - max) / T) the entropy is
// log(sum e) + sum e (max - z) / T / sum e.
#include "cpu/rows_parts.h"

#include "cpu/prefetch.h"
#include "cpu/rows_chunks.h"

namespace fastkd::FASTKD_ISA {
namespace {

// A side's logits of one row.
template <class T>
struct Side {
  double inv_temperature;
  T scale, lowest;
  T max = -kInf<T>;
  double sum = 0, terms = 0;  // of e, and of e (max - z); of coins: of their entropies
  int64_t chunk = 0;          // the first that has the maximum

  explicit Side(double temperature)
      : inv_temperature(1 / temperature), scale(T(kLog2e<double> / temperature)), lowest(exp2_lowest(scale)) {}

  void see(const T* z, int64_t first, int64_t n) {
    const T found = maximum(z, padded(n));
    if (found > max) {
      max = found;
      chunk = first;
    }
  }
  // The first class that has the maximum.
  int64_t best(const RowsTensor& logits, const char* row, int64_t V) const {
    alignas(64) T buffer[kChunk];
    const int64_t n = V - chunk < kChunk ? V - chunk : kChunk;
    const T* z = load_block(logits, row, chunk, n, buffer);
    for (int64_t i = 0; i < n; ++i) {
      if (z[i] == max) return chunk + i;
    }
    return -1;
  }
  void add(const T* z, int64_t n) {
    const T from = finite_max(max), by = scale, least = lowest;
    T total = 0, part = 0;
#pragma omp simd reduction(+ : total, part)
    for (int64_t i = 0; i < padded(n); ++i) {
      const T x = z[i] - from, e = exp2_scaled(x, by, least);
      total += e;
      part += e == T(0) ? T(0) : e * x;
    }
    sum += double(total);
    terms -= double(part);
  }
  // Classes that do not exclude each other: with a = |z| / T that of one is log(1 + e^-a) + a e^-a / (1 + e^-a).
  void add_coins(const T* z, int64_t n) {
    double part = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double a = std::abs(double(z[i])) * inv_temperature, e = std::exp(-a);
      part += std::log1p(e) + (e == 0 ? 0 : a * e / (1 + e));
    }
    sum = 1;
    terms += part;
  }
  double entropy(bool coins) const {
    if (coins) return terms;
    return sum == 0 ? 0 : std::log(sum) + terms * inv_temperature / sum;
  }
};

template <class T>
void describe(const RowsParams<T>& P, int64_t begin, int64_t end, int64_t last) {
  alignas(64) T student_buffer[kChunk], teacher_buffer[kChunk];
  const bool coins = P.divergence == Divergence::kBernoulliKL;
  for (int64_t row = begin; row < end; ++row) {
    P.parts[row] = {};
    if (P.mask && !P.mask[row]) continue;
    Side<T> student(P.temperature[row]), teacher(P.teacher_temperature[row]);
    const char *s_row = P.student.row(row), *t_row = P.teacher.row(row);
    Prefetch ahead(P, row, last, 2);
    const auto walk = [&](auto&& visit) {
      for (int64_t first = 0; first < P.V; first += kChunk) {
        const int64_t n = P.V - first < kChunk ? P.V - first : kChunk;
        visit(load_block(P.student, s_row, first, n, student_buffer),
              load_block(P.teacher, t_row, first, n, teacher_buffer), first, n);
        ahead.some();
      }
    };
    walk([&](const T* s, const T* t, int64_t first, int64_t n) {
      student.see(s, first, n);
      teacher.see(t, first, n);
    });
    walk([&](const T* s, const T* t, int64_t, int64_t n) {
      coins ? student.add_coins(s, n) : student.add(s, n);
      coins ? teacher.add_coins(t, n) : teacher.add(t, n);
    });
    P.parts[row].student_entropy = student.entropy(coins);
    P.parts[row].teacher_entropy = teacher.entropy(coins);
    P.parts[row].agreement = student.best(P.student, s_row, P.V) == teacher.best(P.teacher, t_row, P.V);
  }
}

}  // namespace

template <class T>
RowsDescribe<T> rows_describe() {
  return describe<T>;
}
template RowsDescribe<float> rows_describe();
template RowsDescribe<double> rows_describe();

}  // namespace fastkd::FASTKD_ISA
