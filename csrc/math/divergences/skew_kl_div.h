#pragma once
#include "math/divergences/kl_div.h"

namespace fastkd::FASTKD_ISA {

// What a class adds to KL(own || m) with m = share other + (1 - share) own, of own and other the one p and the other q.
//
// With u = log(m / own) and x = m - own = share (other - own) it is x - own u: as the x of all classes add up to 0, the
// term may have its own, and is >= 0. Where m is near own, u = 2 atanh(r) with r = x / (m + own), and
//   x - own u = r (x - 2 own r^2 tail)
// cancels nothing. Where it is not, u comes of the logarithm of m over the larger of own and other, which exists
// wherever one of them is not 0.
template <class T>
struct Skewed {
  T m, x, u, loss;

  // w: log other - log own
  FASTKD_HD Skewed(T own, T other, T w, T share, T rest) {
    const bool other_larger = w > T(0);
    x = share * (is_near(w) ? own * expm1_series(w) : other - own);
    m = share * other + rest * own;
    // not &&: of a condition that hangs on another no vectors are made
    const bool close = (3 * x < own) & (-3 * x < own), by_other = other_larger & !close;
    const LogRatio<T> log = log_ratio(m, by_other ? other : own, by_other ? rest * (own - other) : x, close);
    // finite, so that 0 times it is 0; of NaN, where p = q = 0, anything
    const T most = T(1e30), below = most > w ? w : most, finite = below > -most ? below : -most;
    u = by_other ? log.log + finite : log.log;
    loss = close ? log.r * (x - 2 * own * (log.r * log.r) * log.tail) : x - own * u;
  }
};

// KL(q || m), m = alpha q + (1 - alpha) p. An alpha of 0 is KL(q || p); one of 1 is 0.
// d/d(log p) = -(1 - alpha) p q / m, and with a multiple of p (1 - alpha) p (m - q) / m.
template <class T>
struct SkewKL {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  using AtZero = ForwardKLEnd<T>;
  T teacher, student;  // shares of the mixture
  FASTKD_HD explicit SkewKL(double parameter)
      : teacher(share_of_mixture(T(parameter))), student(share_of_mixture(T(1 - parameter))) {}

  FASTKD_HD T loss(Element<T> e) const { return skewed(e).loss; }
  FASTKD_HD T slope(Element<T> e) const {
    const Skewed<T> k = skewed(e);
    return student * e.p * (k.x / (k.m + kLeast<T>));
  }

 private:
  FASTKD_HD Skewed<T> skewed(Element<T> e) const { return {e.q, e.p, e.w, student, teacher}; }
};

}  // namespace fastkd::FASTKD_ISA
