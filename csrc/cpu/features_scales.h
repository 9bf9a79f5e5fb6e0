// How a row of features is scaled on the CPU, from its statistics, and what it counts: see features_kernel.cpp.
#pragma once
#include <algorithm>

#include "cpu/features_kernel.h"
#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

// The mean as a value of the row and what lies between: exact where all values are equal, and of a
// row far from 0 the differences keep their digits.
template <class T>
struct Scale {
  T base = 0, offset = 0, factor = 1;
};

template <class T>
struct Statistics {
  double base, mean, squares;  // mean: beyond the base; squares: of what both were taken from
};

template <class T, bool kCentred>
FASTKD_HD T scaled(T value, const Scale<T>& scale) {
  return (kCentred ? (value - scale.base) - scale.offset : value) * scale.factor;
}

// Elements that are added up in T; what they add up to in double.
constexpr int64_t kAtOnce = 512;

// In S: T, or double where T's range is too small for squares.
template <class S, bool kCentred, class T>
Statistics<T> statistics_in(const T* x, int64_t n) {
  const S base = kCentred ? S(x[0]) : S(0);
  S mean = 0;
  if constexpr (kCentred) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, n);
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = begin; i < end; ++i) sum += S(x[i]) - base;
      total += double(sum);
    }
    mean = S(total / double(n));
  }
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += kAtOnce) {
    const int64_t end = std::min(begin + kAtOnce, n);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const S d = kCentred ? (S(x[i]) - base) - mean : S(x[i]);
      sum += d * d;
    }
    squares += double(sum);
  }
  return {double(base), double(mean), double(squares)};
}

template <bool kCentred, class T>
Statistics<T> statistics(const T* x, int64_t n) {
  const Statistics<T> s = statistics_in<T, kCentred>(x, n);
  if (sizeof(T) == 4 && !in_float_range(s.squares)) return statistics_in<double, kCentred>(x, n);
  return s;
}

template <class T>
Scale<T> to_scale(const FeatureScale& f, const Statistics<T>& s) {
  return {T(s.base), T(s.mean), T(f.factor)};
}

// What a row's loss and gradient are multiplied by.
template <class T>
double row_scale(const FeaturesLayer& layer, const FeaturesCall<T>& call, int64_t row, bool gradient) {
  double scale = layer.weight ? double(static_cast<const T*>(layer.weight)[row]) : 1.0;
  if (gradient && call.upstream) scale *= double(call.upstream[(layer.first_row + row) * call.upstream_stride]);
  return scale;
}

template <class T>
double keep(const FeaturesLayer& layer, const FeaturesCall<T>& call, int64_t row, double loss) {
  if (call.row_loss) call.row_loss[layer.first_row + row] = T(loss * layer.layer_weight);
  return loss;
}

inline bool counts(const FeaturesLayer& layer, int64_t row) { return !layer.mask || layer.mask[row]; }

template <class T>
void zero_row(const RowsTensor& grad, int64_t row, int64_t D, T* buffer) {
  for (int64_t i = 0; i < D; ++i) buffer[i] = 0;
  store_block(grad, grad.row(row), 0, D, buffer, false);
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
