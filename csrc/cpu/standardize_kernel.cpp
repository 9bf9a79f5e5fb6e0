// Standardizes rows of logits on the CPU, and brings a gradient back through that: see fastkd/ops/standardize.py for
// the formulas. Compiled once per instruction set. Vectors run across classes; across rows where these lie side by
// side.
//
// The mean is found as the first class and what the others lie beyond it, and once more from what is left: a row of
// equal classes is 0 exactly, and one far from 0 keeps its digits. A row's result depends on that row alone.
#include "cpu/standardize_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kBlock = 512;  // classes of a row, or rows side by side, that are walked and added up in T
constexpr int64_t kAtOnce = 32;  // classes of rows side by side that are added up in T
constexpr int64_t kRows = 64;    // side by side: so few that all classes of them stay in the cache

template <class T>
FASTKD_HD bool counts(T x) {
  return !(x == -kInf<T>);  // NaN does
}

// The mean as a value of T and what lies between, and what is multiplied with: see RowMoments.
template <class T>
struct Scale {
  T mean, rest, inverse, curvature;

  explicit Scale(const RowMoments& m)
      : mean(T(m.mean)), rest(T(m.mean - double(mean))), inverse(T(m.inverse())), curvature(T(m.curvature())) {}
};
template <class T>
FASTKD_HD T centred(T x, T mean, T rest) {
  return (x - mean) - rest;
}

RowMoments moments_of(double mean, double count, double sum, double squares) {
  const double rest = count > 0 ? sum / count : 0, left = squares - sum * rest;
  // rounding may leave less than nothing; NaN stays
  return {mean + rest, count > 1 ? std::sqrt(left < 0 ? 0 : left / (count - 1)) : left * 0, count};
}

// f(block, n) of the classes of a row, n of which are there; behind them -inf up to a whole vector.
template <class T, class F>
void walk(const RowsTensor& x, const char* row, int64_t V, F&& f) {
  alignas(64) T buffer[kBlock];
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    const int64_t n = std::min(kBlock, V - begin);
    f(load_block(x, row, begin, n, buffer), begin, n);
  }
}

template <class T>
T first_of(const RowsTensor& x, const char* row, int64_t V) {
  alignas(64) T buffer[kLanes];
  for (int64_t begin = 0; begin < V; begin += kLanes) {
    const T* v = load_block(x, row, begin, std::min(kLanes, V - begin), buffer);
    for (int64_t i = 0; i < std::min(kLanes, V - begin); ++i) {
      if (counts(v[i])) return v[i];
    }
  }
  return 0;
}

template <class T>
RowMoments row_moments(const RowsTensor& x, const char* row, int64_t V) {
  const T base = first_of<T>(x, row, V);
  double total = 0, count = 0, squares = 0;
  walk<T>(x, row, V, [&](const T* v, int64_t, int64_t n) {
    T sum = 0, number = 0;
#pragma omp simd reduction(+ : sum, number)
    for (int64_t i = 0; i < n; ++i) {
      sum += counts(v[i]) ? v[i] - base : T(0);
      number += counts(v[i]) ? T(1) : T(0);
    }
    total += double(sum);
    count += double(number);
  });
  const T mean = T(count > 0 ? double(base) + total / count : 0.0);
  total = 0;
  walk<T>(x, row, V, [&](const T* v, int64_t, int64_t n) {
    T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
    for (int64_t i = 0; i < n; ++i) {
      const T d = counts(v[i]) ? v[i] - mean : T(0);
      sum += d;
      square += d * d;
    }
    total += double(sum);
    squares += double(square);
  });
  return moments_of(double(mean), count, total, squares);
}

template <class T>
void forward_row(const StandardizeParams<T>& P, int64_t row) {
  const RowsTensor& x = P.rows.student;
  const char* from = x.row(row);
  char* to = P.rows.grad.row(row);
  const RowMoments moments = row_moments<T>(x, from, P.rows.V);
  if (P.moments) P.moments[row] = moments;
  const Scale<T> k(moments);
  alignas(64) T out[kBlock];
  walk<T>(x, from, P.rows.V, [&](const T* v, int64_t begin, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T z = centred(v[i], k.mean, k.rest) * k.inverse;
      out[i] = counts(v[i]) ? z : v[i];
    }
    store_block(P.rows.grad, to, begin, n, out, false);
  });
}

template <class T>
void backward_row(const StandardizeParams<T>& P, int64_t row) {
  const RowsTensor &x = P.rows.student, &upstream = P.rows.teacher;
  const char *from = x.row(row), *gradient = upstream.row(row);
  const char* addend = P.addend ? P.addend + (gradient - upstream.data) : nullptr;
  char* to = P.rows.grad.row(row);
  const RowMoments& moments = P.moments[row];
  const Scale<T> k(moments);
  alignas(64) T buffer[kBlock], room[kBlock], out[kBlock];
  double total = 0, along = 0;
  walk<T>(x, from, P.rows.V, [&](const T* v, int64_t begin, int64_t n) {
    const T* g = load_block(upstream, gradient, begin, n, buffer);
    T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < n; ++i) {
      const T of_class = counts(v[i]) ? g[i] : T(0), c = counts(v[i]) ? centred(v[i], k.mean, k.rest) : T(0);
      sum += of_class;
      product += of_class * c;
    }
    total += double(sum);
    along += double(product);
  });
  const T mean = T(total / moments.count), slope = T(along * moments.curvature());
  const bool constant = moments.deviation == 0;
  walk<T>(x, from, P.rows.V, [&](const T* v, int64_t begin, int64_t n) {
    const T* g = load_block(upstream, gradient, begin, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T z = ((g[i] - mean) - centred(v[i], k.mean, k.rest) * slope) * k.inverse;
      out[i] = constant | !counts(v[i]) ? T(0) : z;
    }
    if (addend) {
      const T* more = load_block(upstream, addend, begin, n, room);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] += more[i];
    }
    store_block(P.rows.grad, to, begin, n, out, false);
  });
}

// Rows that lie side by side: a lane has a row.

// The elements of one class as a row.
struct Classes {
  RowsTensor across;
  char* first;
  int64_t step;

  Classes(const RowsTensor& x, int64_t row) : across(x), first(x.row(row)), step(x.stride_v * x.element_size) {
    across.stride_v = 1;
  }
  template <class T>
  const T* load(int64_t v, int64_t n, T* buffer) const {
    return load_block(across, first + v * step, 0, n, buffer);
  }
};

// f(v, sums) of each class, adds up sums [kSums, kRows] in T, and these in double.
template <int kSums, class T, class F>
void add_up(int64_t V, double (&total)[kSums][kRows], F&& f) {
  for (auto& row : total) std::fill_n(row, kRows, 0.0);
  for (int64_t first = 0; first < V; first += kAtOnce) {
    alignas(64) T sums[kSums][kRows] = {};
    for (int64_t v = first; v < std::min(first + kAtOnce, V); ++v) f(v, sums);
    for (int k = 0; k < kSums; ++k) {
      for (int64_t i = 0; i < kRows; ++i) total[k][i] += double(sums[k][i]);
    }
  }
}

template <class T>
struct LaneScales {
  alignas(64) T mean[kRows] = {}, rest[kRows] = {}, inverse[kRows] = {};

  void set(int64_t i, const RowMoments& m) {
    const Scale<T> k(m);
    mean[i] = k.mean;
    rest[i] = k.rest;
    inverse[i] = k.inverse;
  }
};

template <class T>
void forward_rows(const StandardizeParams<T>& P, int64_t row, int64_t n) {
  const Classes x(P.rows.student, row), out(P.rows.grad, row);
  const int64_t V = P.rows.V, lanes = padded(n);
  alignas(64) T buffer[kRows], base[kRows], mean[kRows];
  std::fill_n(base, kRows, -kInf<T>);
  bool missing = true;
  for (int64_t v = 0; v < V && missing; ++v) {
    const T* s = x.load(v, n, buffer);
    missing = false;
    for (int64_t i = 0; i < n; ++i) {
      base[i] = counts(base[i]) ? base[i] : s[i];
      missing |= !counts(base[i]);
    }
  }
  double sums[2][kRows], counted[kRows];
  add_up<2, T>(V, sums, [&](int64_t v, T(&part)[2][kRows]) {
    const T* s = x.load(v, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      part[0][i] += counts(s[i]) ? s[i] - base[i] : T(0);
      part[1][i] += counts(s[i]) ? T(1) : T(0);
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    counted[i] = sums[1][i];
    mean[i] = T(counted[i] > 0 ? double(base[i]) + sums[0][i] / counted[i] : 0.0);
  }
  std::fill(mean + n, mean + lanes, T(0));
  add_up<2, T>(V, sums, [&](int64_t v, T(&part)[2][kRows]) {
    const T* s = x.load(v, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T d = counts(s[i]) ? s[i] - mean[i] : T(0);
      part[0][i] += d;
      part[1][i] += d * d;
    }
  });
  LaneScales<T> k;
  for (int64_t i = 0; i < n; ++i) {
    const RowMoments moments = moments_of(double(mean[i]), counted[i], sums[0][i], sums[1][i]);
    if (P.moments) P.moments[row + i] = moments;
    k.set(i, moments);
  }
  alignas(64) T values[kRows];
  for (int64_t v = 0; v < V; ++v) {
    const T* s = x.load(v, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T z = centred(s[i], k.mean[i], k.rest[i]) * k.inverse[i];
      values[i] = counts(s[i]) ? z : s[i];
    }
    store_block(out.across, out.first + v * out.step, 0, n, values, false);
  }
}

template <class T>
void backward_rows(const StandardizeParams<T>& P, int64_t row, int64_t n) {
  const Classes x(P.rows.student, row), upstream(P.rows.teacher, row), out(P.rows.grad, row);
  const int64_t V = P.rows.V, lanes = padded(n);
  alignas(64) T buffer[kRows], room[kRows], values[kRows], mean[kRows] = {}, slope[kRows] = {};
  alignas(64) bool zero[kRows] = {};
  LaneScales<T> k;
  for (int64_t i = 0; i < n; ++i) {
    zero[i] = P.rows.mask && !P.rows.mask[row + i];
    if (!zero[i]) k.set(i, P.moments[row + i]);
  }
  double sums[2][kRows];
  add_up<2, T>(V, sums, [&](int64_t v, T(&part)[2][kRows]) {
    const T *s = x.load(v, n, buffer), *g = upstream.load(v, n, room);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T of_class = counts(s[i]) ? g[i] : T(0), c = counts(s[i]) ? centred(s[i], k.mean[i], k.rest[i]) : T(0);
      part[0][i] += of_class;
      part[1][i] += of_class * c;
    }
  });
  for (int64_t i = 0; i < n; ++i) {
    if (zero[i]) continue;
    const RowMoments& moments = P.moments[row + i];
    mean[i] = T(sums[0][i] / moments.count);
    slope[i] = T(sums[1][i] * moments.curvature());
    zero[i] = moments.deviation == 0;
  }
  const char* addend = P.addend ? P.addend + (upstream.first - P.rows.teacher.data) : nullptr;
  for (int64_t v = 0; v < V; ++v) {
    const T *s = x.load(v, n, buffer), *g = upstream.load(v, n, room);
#pragma omp simd
    for (int64_t i = 0; i < lanes; ++i) {
      const T z = ((g[i] - mean[i]) - centred(s[i], k.mean[i], k.rest[i]) * slope[i]) * k.inverse[i];
      values[i] = zero[i] | !counts(s[i]) ? T(0) : z;
    }
    if (addend) {
      const T* more = load_block(upstream.across, addend + v * upstream.step, 0, n, room);
#pragma omp simd
      for (int64_t i = 0; i < lanes; ++i) values[i] += more[i];
    }
    store_block(out.across, out.first + v * out.step, 0, n, values, false);
  }
}

template <class T>
void zero_row(const RowsTensor& grad, int64_t row, int64_t V) {
  alignas(64) const T zero[kBlock] = {};
  for (int64_t begin = 0; begin < V; begin += kBlock) {
    store_block(grad, grad.row(row), begin, std::min(kBlock, V - begin), zero, false);
  }
}

template <class T, bool kBackward>
void rows(const StandardizeParams<T>& P, int64_t begin, int64_t end) {
  const int64_t run = side_by_side(P);
  for (int64_t row = begin; row < end;) {
    const int64_t n = run == 0 ? 1 : std::min({end - row, kRows, run - row % run});
    if (run > 0) {
      kBackward ? backward_rows(P, row, n) : forward_rows(P, row, n);
    } else if (!P.rows.mask || P.rows.mask[row]) {
      kBackward ? backward_row(P, row) : forward_row(P, row);
    } else if (kBackward) {
      zero_row<T>(P.rows.grad, row, P.rows.V);
    }
    row += n;
  }
}

template <class T>
constexpr StandardizeKernel<T> kKernel{rows<T, false>, rows<T, true>};

}  // namespace

template <class T>
const StandardizeKernel<T>& standardize_kernel() {
  return kKernel<T>;
}
template const StandardizeKernel<float>& standardize_kernel();
template const StandardizeKernel<double>& standardize_kernel();

}  // namespace fastkd::FASTKD_ISA
