// Divergences between a teacher's q and a student's p, class by class.
//
// A divergence D(q, p) = sum_j loss(e_j) tells the rows schedule two things about one class j:
//   loss(e)  what it adds to the row's divergence, before the factor T^2
//   grad(e)  dD / d(student_j / T)
// With w = log p - log q both are written so that nothing cancels when student and teacher
// agree: near convergence w is small and known to full precision, p - q is not.
#pragma once
#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {

template <class T>
struct Element {
  T p;  // student's probability
  T q;  // teacher's probability
  T w;  // log p - log q; NaN where both are 0
};

// KL(q || p) = sum q (log q - log p) = sum q (e^w - 1 - w): every term is >= 0.
// d/dz = p - q = q (e^w - 1).
template <class T>
struct ForwardKL {
  static FASTKD_HD T loss(Element<T> e) {
    const T near = e.q * (e.w * e.w * bregman_series(e.w));
    const T far = (e.p - e.q) - e.q * e.w;
    const T term = is_near(e.w) ? near : far;
    return e.q == T(0) ? e.p : term;  // never 0 * inf
  }
  static FASTKD_HD T grad(Element<T> e) {
    const T near = e.q * e.w + e.q * (e.w * e.w * bregman_series(e.w));
    return is_near(e.w) ? near : e.p - e.q;
  }

 private:
  static FASTKD_HD bool is_near(T w) { return w * w < T(0.09); }
};

}  // namespace fastkd::FASTKD_ISA
