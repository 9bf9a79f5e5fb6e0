#pragma once
#include "math/divergences/kl_div.h"
#include "math/divergences/reverse_kl_div.h"

namespace fastkd::FASTKD_ISA {

// With m = beta q + (1 - beta) p, u = log(m / q) and v = log(m / p) = u - w:
//   beta KL(q || m) + (1 - beta) KL(p || m) = -sum (beta q u + (1 - beta) p v), slope -(1 - beta) p v
// A beta of 0 is KL(q || p) and one of 1 is KL(p || q), by convention.
//
// Far from w = 0 v comes of log(m / larger), larger that of p and q, which exists wherever one of them is not 0.
//
// Near w = 0 what a class adds is of second order, and the two terms are of first. As the m - q and the m - p of all
// classes add up to 0, they may be
//   beta q (e^u - 1 - u) + (1 - beta) p (e^v - 1 - v)
// instead, both >= 0. There v is of x = m - p = beta p (e^-w - 1), with r = x / (m + p):
//   v = 2 atanh(r) = 2 r (1 + r^2 tail),  p (e^v - 1 - v) = x - p v = r (x - 2 p r^2 tail)
// right to a few ulp whatever beta is. u = v + w is not, where beta is near 1; but then its term is small.
template <class T>
struct JensenShannon {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  using AtZero = ForwardKLEnd<T>;
  using AtOne = ReverseKL<T>;
  T beta, rest;
  FASTKD_HD explicit JensenShannon(double parameter)
      : beta(share_of_mixture(T(parameter))), rest(share_of_mixture(T(1 - parameter))) {}

  FASTKD_HD T loss(Element<T> e) const {
    const Mixture m = mixture(e);
    const T near = rest * m.log.r * (m.x - 2 * e.p * (m.log.r * m.log.r) * m.log.tail) +
                   beta * e.q * (m.u * m.u * bregman_series(m.u));
    const T far = -(beta * e.q * m.u + rest * e.p * m.v);
    return is_near(e.w) ? near : far;
  }
  FASTKD_HD T slope(Element<T> e) const { return -rest * e.p * mixture(e).v; }

 private:
  struct Mixture {
    T u, v, x;        // x: how far m lies above what log is relative to
    LogRatio<T> log;  // near: of m / p; far: of m / larger
  };
  FASTKD_HD Mixture mixture(Element<T> e) const {
    const bool student_larger = e.w > T(0), near = is_near(e.w);
    Mixture m;
    m.x = student_larger ? beta * (e.q - e.p) : rest * (e.p - e.q);
    m.x = near ? beta * e.p * expm1_series(-e.w) : m.x;
    m.log = log_ratio(beta * e.q + rest * e.p, near || student_larger ? e.p : e.q, m.x, near);
    // finite, so that 0 times it is 0; of NaN, where p = q = 0, anything
    const T most = T(1e30), below = most > e.w ? e.w : most, w = below > -most ? below : -most;
    m.u = near || student_larger ? m.log.log + w : m.log.log;
    m.v = near || student_larger ? m.log.log : m.log.log - w;
    return m;
  }
};

}  // namespace fastkd::FASTKD_ISA
