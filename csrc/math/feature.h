// Distances between two rows of features, as what the features schedule needs to know of them.
//
//   x = (s - m_s) a_s, y = (t - m_t) a_t, e = x - y;  m and a from the row's statistics, or 0 and 1
//   loss = share sum l(e), u = l'(e) / 2, half a slope
//   grad = 2 share a_s (u - mean - x p);  mean and p take out what the statistics let the row not change
//
// l is a square, or smooth L1; u of a square is e. Plain: a = 1. L2: m = 0, a = 1 / max(|s|, 1e-12), p = sum x u.
// Standardized: m = mean s, a = 1 / sqrt(var s + 1e-6), mean = sum u / D, p = sum x u / D. Cosine: half of L2, as
// 1 - cos = |x - y|^2 / 2. Sums of e and x e, not 1 - sum x y: nothing cancels near convergence.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/inline.h"

namespace fastkd {

// The numbers are those of fastkd/ops/features.py.
enum class Feature : int64_t { kPlain, kL2, kStandardized, kCosine, kCount };

inline constexpr double kL2Epsilon = 1e-12, kVarianceEpsilon = 1e-6;

// What is taken from a row, and what it is multiplied by.
struct FeatureScale {
  double mean = 0, factor = 1;
  bool fixed = true;  // the factor does not change with the row
};

// Whether squares or powers of float, added up, have kept their digits.
FASTKD_HD bool in_float_range(double sum) { return sum > 1e-30 && sum < 1e37; }

FASTKD_HD bool normalized(Feature f) { return f != Feature::kPlain; }
FASTKD_HD bool centred(Feature f) { return f == Feature::kStandardized; }
FASTKD_HD double loss_share(Feature f) { return f == Feature::kCosine ? 0.5 : 1.0; }

// From the mean, and the sum of the squares of what the mean was taken from.
FASTKD_HD FeatureScale feature_scale(Feature f, double mean, double squares, int64_t D) {
  if (f == Feature::kPlain) return {};
  if (f == Feature::kStandardized) return {mean, 1 / sqrt(squares / double(D) + kVarianceEpsilon), false};
  const double length = sqrt(squares);
  if (length == 0) return {0, 0, true};  // no direction, and no gradient
  return {0, 1 / (length < kL2Epsilon ? kL2Epsilon : length), length < kL2Epsilon};
}

// Smooth L1: e^2 / (2 beta) where |e| < beta, else |e| - beta / 2; of beta = 0, and of one that is subnormal in T, |e|.
// There the slope is 1, -1 or 0, but of subnormal e. NaN stays NaN.
template <class T>
struct SmoothL1 {
  static constexpr bool kSquares = false;
  T beta = 0, half_inverse = std::numeric_limits<T>::max();

  SmoothL1() = default;
  explicit SmoothL1(double given) {
    if (given < double(std::numeric_limits<T>::min())) return;
    const double most = double(std::numeric_limits<T>::max());
    beta = T(given < most ? given : most);
    half_inverse = T(0.5 / given);
  }
  FASTKD_HD T half_slope(T e) const {
    T u = e * half_inverse;
    u = T(0.5) < u ? T(0.5) : u;
    return T(-0.5) > u ? T(-0.5) : u;
  }
  FASTKD_HD T value(T e, T u) const {
    const T size = e < 0 ? -e : e;
    return size < beta ? e * u : size - T(0.5) * beta;
  }
};

template <class T>
struct Squares {
  static constexpr bool kSquares = true;
  FASTKD_HD explicit Squares(const SmoothL1<T>&) {}  // made as SmoothL1 is, of the numbers of a call
  FASTKD_HD T half_slope(T e) const { return e; }
  FASTKD_HD T value(T e, T u) const { return e * u; }
};

// Of the gradient: k (u - mean - x p).
struct FeatureSlope {
  double k, mean, p;
};
FASTKD_HD FeatureSlope feature_slope(Feature f, const FeatureScale& student, double sum_u, double sum_xu, int64_t D,
                                     double scale) {
  const double k = 2 * loss_share(f) * student.factor * scale;
  if (f == Feature::kStandardized) return {k, sum_u / double(D), sum_xu / double(D)};
  return {k, 0, student.fixed ? 0 : sum_xu};
}

}  // namespace fastkd
