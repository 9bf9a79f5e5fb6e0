#pragma once
#include "math/divergences/reverse_kl_div.h"
#include "math/divergences/skew_kl_div.h"

namespace fastkd::FASTKD_ISA {

// KL(p || m), m = alpha p + (1 - alpha) q. An alpha of 0 is KL(p || q); one of 1 is 0.
// With v = log(m / p): d/d(log p) = p (1 - v) - alpha p p / m, and with a multiple of p
// -p v + alpha p (m - p) / m.
template <class T>
struct SkewReverseKL {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  using AtZero = ReverseKL<T>;
  T student, teacher;  // shares of the mixture
  FASTKD_HD explicit SkewReverseKL(double parameter)
      : student(share_of_mixture(T(parameter))), teacher(share_of_mixture(T(1 - parameter))) {}

  FASTKD_HD T loss(Element<T> e) const { return skewed(e).loss; }
  FASTKD_HD T slope(Element<T> e) const {
    const Skewed<T> k = skewed(e);
    return student * e.p * (k.x / (k.m + kLeast<T>)) - e.p * k.u;
  }

 private:
  FASTKD_HD Skewed<T> skewed(Element<T> e) const { return {e.p, e.q, -e.w, teacher, student}; }
};

}  // namespace fastkd::FASTKD_ISA
