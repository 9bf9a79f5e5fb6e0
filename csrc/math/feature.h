// Distances between two rows of features, as what the features schedule needs to know of them.
//
//   x = (s - m_s) a_s, y = (t - m_t) a_t, e = x - y;  m and a from the row's statistics, or 0 and 1
//   loss = share sum e^2
//   grad = 2 share a_s (e - mean - x p);  mean and p take out what the statistics let the row not change
//
// Squares: a = 1. L2: m = 0, a = 1 / max(|s|, 1e-12), p = sum x e. Standardized: m = mean s,
// a = 1 / sqrt(var s + 1e-6), mean = sum e / D, p = sum x e / D. Cosine: half of L2, as
// 1 - cos = |x - y|^2 / 2. Sums of e and x e, not 1 - sum x y: nothing cancels near convergence.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

// The numbers are those of fastkd/ops/features.py.
enum class Feature : int64_t { kSquares, kL2, kStandardized, kCosine, kCount };

inline constexpr double kL2Epsilon = 1e-12, kVarianceEpsilon = 1e-6;

// What is taken from a row, and what it is multiplied by.
struct FeatureScale {
  double mean = 0, factor = 1;
  bool fixed = true;  // the factor does not change with the row
};

// Whether squares or powers of float, added up, have kept their digits.
FASTKD_HD bool in_float_range(double sum) { return sum > 1e-30 && sum < 1e37; }

FASTKD_HD bool normalized(Feature f) { return f != Feature::kSquares; }
FASTKD_HD bool centred(Feature f) { return f == Feature::kStandardized; }
FASTKD_HD double loss_share(Feature f) { return f == Feature::kCosine ? 0.5 : 1.0; }

// From the mean, and the sum of the squares of what the mean was taken from.
FASTKD_HD FeatureScale feature_scale(Feature f, double mean, double squares, int64_t D) {
  if (f == Feature::kSquares) return {};
  if (f == Feature::kStandardized) return {mean, 1 / sqrt(squares / double(D) + kVarianceEpsilon), false};
  const double length = sqrt(squares);
  if (length == 0) return {0, 0, true};  // no direction, and no gradient
  return {0, 1 / (length < kL2Epsilon ? kL2Epsilon : length), length < kL2Epsilon};
}

// Of the gradient: k (e - mean - x p).
struct FeatureSlope {
  double k, mean, p;
};
FASTKD_HD FeatureSlope feature_slope(Feature f, const FeatureScale& student, double sum_e, double sum_xe, int64_t D,
                                     double scale) {
  const double k = 2 * loss_share(f) * student.factor * scale;
  if (f == Feature::kStandardized) return {k, sum_e / double(D), sum_xe / double(D)};
  return {k, 0, student.fixed ? 0 : sum_xe};
}

}  // namespace fastkd
