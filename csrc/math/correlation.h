// One less the correlation of student and teacher along a row or a column of their probabilities p and q,
//
//   loss = 1 - ab / (|a| |b| + eps), of the centred a and b
//   dL/da = -b / (|a| |b| + eps) + ab |b| / |a| a / (|a| |b| + eps)^2
//
// from sums of products. Where D = a - b is small beside both, of sums of a D and D D:
//
//   |a| |b| - ab = (|D|^2 - (|a| - |b|)^2) / 2, |a| - |b| = D (a + b) / (|a| + |b|)
//   dL/da = D / (|a| |b| + eps) - (|b| / |a| aD + eps) a / (|a| |b| + eps)^2
//
// so that nothing cancels when student and teacher agree. The gradient of a logit is p (G - sum p G) / T, where G is
// the sum of both dL/da, of its row and its column.
#pragma once
#include <cmath>
#include <limits>

#include "math/divergence.h"

namespace fastkd {
namespace FASTKD_ISA {

// p - q, w = log p - log q
template <class T>
FASTKD_HD T p_minus_q(Element<T> e) {
  return is_near(e.w) ? e.q * expm1_series(e.w) : e.p - e.q;
}

}  // namespace FASTKD_ISA

struct Moments {
  double aa = 0, bb = 0, ab = 0, aD = 0, DD = 0;
};

struct Correlation {
  double loss, slope, own;  // dL/da = slope D + own a; where the slope is negative, slope b + own a
};
inline constexpr Correlation kUncorrelated{1, 0, 0};

// Whether n values of a mean differ from it by no more than rounding errors of T, given the sum of their squares less
// it. Of NaN: false, so that NaN stays.
template <class T>
FASTKD_HD bool is_constant(double squares, double n, double mean) {
  constexpr double kRounding = 4 * double(std::numeric_limits<T>::epsilon());
  constexpr double kLeast = double(std::numeric_limits<T>::min());
  return squares <= kLeast || squares <= kRounding * kRounding * (squares + n * mean * mean);
}

template <class T>
FASTKD_HD Correlation correlation(const Moments& m, double n, double student_mean, double teacher_mean, double eps) {
  if (is_constant<T>(m.aa, n, student_mean) || is_constant<T>(m.bb, n, teacher_mean)) return kUncorrelated;
  const double a = sqrt(m.aa), b = sqrt(m.bb), inverse = 1 / (a * b + eps);
  if (!(m.DD < a * b / 2)) return {(a * b - m.ab + eps) * inverse, -inverse, m.ab * b / a * inverse * inverse};
  const double apart = (2 * m.aD - m.DD) / (a + b), rest = m.DD - apart * apart;
  return {((rest < 0 ? 0 : rest) / 2 + eps) * inverse, inverse, -(b / a * m.aD + eps) * inverse * inverse};
}

// The same of n values whose means are known as well: those of p, D and q.
struct ColumnMoments {
  double n = 0, mean = 0, difference = 0, teacher_mean = 0;
  Moments sums;

  // Adds those of other values.
  FASTKD_HD void add(const ColumnMoments& x) {
    if (x.n == 0) return;
    const double all = n + x.n, share = x.n / all, weight = n * share;
    const double p = x.mean - mean, D = x.difference - difference, q = x.teacher_mean - teacher_mean;
    sums.aa += x.sums.aa + p * p * weight;
    sums.bb += x.sums.bb + q * q * weight;
    sums.ab += x.sums.ab + p * q * weight;
    sums.aD += x.sums.aD + p * D * weight;
    sums.DD += x.sums.DD + D * D * weight;
    mean += p * share;
    difference += D * share;
    teacher_mean += q * share;
    n = all;
  }
  // What slope D + own p, or slope q + own p, is less by.
  FASTKD_HD double constant(const Correlation& c) const {
    return -(c.slope * (c.slope < 0 ? teacher_mean : difference) + c.own * mean);
  }
};

// Sums over n values less a value that stands for their mean, as that of one of them does.
template <class T>
struct ShiftedSums {
  T p, D, q, pp, qq, pq, pD, DD;
};
template <class T>
FASTKD_HD ColumnMoments column_moments(int64_t n, T p, T D, T q, const ShiftedSums<T>& s) {
  if (n == 0) return {};
  const double inverse = 1 / double(n), x = double(s.p) * inverse, y = double(s.D) * inverse, z = double(s.q) * inverse;
  const auto square = [](double sum, double less) { return sum > less ? sum - less : sum <= less ? 0 : sum; };
  return {double(n),
          double(p) + x,
          double(D) + y,
          double(q) + z,
          {square(double(s.pp), x * double(s.p)), square(double(s.qq), z * double(s.q)), double(s.pq) - x * double(s.q),
           double(s.pD) - x * double(s.D), square(double(s.DD), y * double(s.D))}};
}

}  // namespace fastkd
