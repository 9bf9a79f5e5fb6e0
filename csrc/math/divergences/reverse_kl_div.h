#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// KL(p || q) = sum p (log p - log q) = sum p (e^-w - 1 + w). Slope p w. Where q = 0 both are +inf,
// also for a p so small that it became 0.
template <class T>
struct ReverseKL {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  FASTKD_HD explicit ReverseKL(double = 0) {}

  FASTKD_HD T loss(Element<T> e) const {
    const T near = e.p * (e.w * e.w * bregman_series(-e.w));
    const T far = (e.q - e.p) + e.p * e.w;
    const T term = is_near(e.w) ? near : far;
    return e.p == T(0) ? without_student(e.w, e.q) : term;
  }
  FASTKD_HD T slope(Element<T> e) const { return e.p == T(0) ? without_student(e.w, T(0)) : e.p * e.w; }

 private:
  static FASTKD_HD T without_student(T w, T otherwise) { return w == kInf<T> ? w : otherwise; }
};

}  // namespace fastkd::FASTKD_ISA
