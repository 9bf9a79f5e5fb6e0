// Divergences between a teacher's q and a student's p, class by class.
//
// A divergence D(q, p) = sum_j loss(e_j) tells the rows schedule about one class j
//   loss(e)   what it adds to the row's divergence, before the factor T^2
//   slope(e)  dD / d(log p_j), up to a multiple of p_j; with z = student / T
//             dD / dz_k = slope_k - p_k sum_j slope_j
// and about the whole row
//   kCentred         the slopes add up to 0, so their sum need not be known
//   kTeacherEntropy  the teacher's entropy -sum q log q is added to the loss
// With w = log p - log q all are written so that nothing cancels when student and teacher
// agree: near convergence w is small and known to full precision, p - q is not.
#pragma once
#include "common/params.h"
#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {

template <class T>
struct Element {
  T p;  // student's probability
  T q;  // teacher's probability
  T w;  // log p - log q; +-inf where one of them is 0, NaN where both are
};

// Where e^w - 1 - w would cancel and its series does not.
template <class T>
FASTKD_HD bool is_near(T w) {
  return w * w < T(0.09);
}

// KL(q || p) = sum q (log q - log p) = sum q (e^w - 1 - w): every term is >= 0.
// Slope q (e^w - 1) = p - q.
template <class T>
struct ForwardKL {
  static constexpr bool kCentred = true, kTeacherEntropy = false;
  FASTKD_HD explicit ForwardKL(const DivergenceParameter<T>&) {}

  FASTKD_HD T loss(Element<T> e) const {
    const T near = e.q * (e.w * e.w * bregman_series(e.w));
    const T far = (e.p - e.q) - e.q * e.w;
    const T term = is_near(e.w) ? near : far;
    return e.q == T(0) ? e.p : term;  // never 0 * inf
  }
  FASTKD_HD T slope(Element<T> e) const { return is_near(e.w) ? e.q * expm1_series(e.w) : e.p - e.q; }
};

// -sum q log p = KL(q || p) + H(q): both are sums of terms >= 0.
template <class T>
struct SoftCrossEntropy : ForwardKL<T> {
  static constexpr bool kTeacherEntropy = true;
  using ForwardKL<T>::ForwardKL;
};

// KL(p || q) = sum p (log p - log q) = sum p (e^-w - 1 + w). Slope p w. Where q = 0 both are +inf,
// also for a p so small that it became 0.
template <class T>
struct ReverseKL {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  FASTKD_HD explicit ReverseKL(const DivergenceParameter<T>&) {}

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

// With m = beta q + (1 - beta) p, u = log(m / q) and v = log(m / p):
//   beta KL(q || m) + (1 - beta) KL(p || m) = -sum (beta q u + (1 - beta) p v), slope -(1 - beta) p v.
// Near w = 0 the sum of the two terms cancels, and so does one of u and v: there loss / q and
// v are polynomials in w. 0 < beta < 1: the ends are KL(q || p) and KL(p || q), by convention.
template <class T>
struct JensenShannon {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  DivergenceParameter<T> parameter;
  T beta, rest;
  FASTKD_HD explicit JensenShannon(const DivergenceParameter<T>& parameter)
      : parameter(parameter), beta(parameter.value), rest(parameter.rest) {}

  FASTKD_HD T loss(Element<T> e) const {
    const T near = e.q * (e.w * e.w * polynomial(parameter.loss_series, e.w));
    const T lower = far_log(e), u = e.w > T(0) ? lower + e.w : lower, v = e.w > T(0) ? lower : lower - e.w;
    const T far = -(beta * times(e.q, u) + rest * times(e.p, v));
    return is_near(e.w) ? near : far;
  }
  FASTKD_HD T slope(Element<T> e) const {
    const T near = e.w * polynomial(parameter.slope_series, e.w);
    const T lower = far_log(e), far = e.w > T(0) ? lower : lower - e.w;
    return -rest * times(e.p, is_near(e.w) ? near : far);
  }

 private:
  static FASTKD_HD T times(T probability, T log) { return probability == T(0) ? T(0) : probability * log; }
  static FASTKD_HD T polynomial(const T (&series)[DivergenceParameter<T>::kTerms], T w) {
    T y = series[DivergenceParameter<T>::kTerms - 1];
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 16
#endif
    for (int i = DivergenceParameter<T>::kTerms - 2; i >= 0; --i) y = y * w + series[i];
    return y;
  }
  // Of u and v the one <= 0, log(m / the larger of p and q); the other lies |w| above it.
  FASTKD_HD T far_log(Element<T> e) const {
    const bool student_larger = e.w > T(0);
    const T larger = student_larger ? e.p : e.q, smaller = student_larger ? e.q : e.p;
    return log_ratio(beta * e.q + rest * e.p, larger, (student_larger ? beta : rest) * (smaller - larger));
  }
};

template <class D>
struct DivergenceType {
  using type = D;
};

// f(DivergenceType<D>()): the only place where a number becomes a divergence.
template <class T, class F>
decltype(auto) dispatch_divergence(Divergence which, F&& f) {
#define FASTKD_CASE(name)   \
  case Divergence::k##name: \
    return f(DivergenceType<name<T>>());
  switch (which) {
    FASTKD_FOR_EACH_DIVERGENCE(FASTKD_CASE)
    case Divergence::kCount:
      break;
  }
#undef FASTKD_CASE
  __builtin_unreachable();  // the binding has checked
}

}  // namespace fastkd::FASTKD_ISA
