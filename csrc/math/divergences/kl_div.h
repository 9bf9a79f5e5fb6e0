#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// KL(q || p) = sum q (log q - log p) = sum q (e^w - 1 - w): every term is >= 0.
// Slope q (e^w - 1) = p - q.
template <class T>
struct ForwardKL {
  static constexpr bool kCentred = true, kTeacherEntropy = false;
  FASTKD_HD explicit ForwardKL(double = 0) {}

  FASTKD_HD T loss(Element<T> e) const {
    const T near = e.q * (e.w * e.w * bregman_series(e.w));
    const T far = (e.p - e.q) - e.q * e.w;
    const T term = is_near(e.w) ? near : far;
    return e.q == T(0) ? e.p : term;  // never 0 * inf
  }
  FASTKD_HD T slope(Element<T> e) const { return is_near(e.w) ? e.q * expm1_series(e.w) : e.p - e.q; }
};

// As the end of a range of divergences that are not centred: its sums are made as those of the other rows.
template <class T>
struct ForwardKLEnd : ForwardKL<T> {
  static constexpr bool kCentred = false;
};

}  // namespace fastkd::FASTKD_ISA
