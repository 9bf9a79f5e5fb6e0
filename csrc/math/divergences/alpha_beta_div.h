#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// -1 / (a b) sum (q^a p^b - a / s q^s - b / s p^s) with s = a + b, and its limits where a, b or both are 0.
//
// Near w = 0 a class adds q^s w^2 sum_k c_k w^k with c_k = (s^(k+1) - b^(k+1)) / (a (k + 2)!), in which the quotient is
// the sum of the products s^i b^(k-i): nothing cancels, and a may be 0. Its slope is (p^s - q^a p^b) / a, which is
// q^a p^b w E(a w) with E(x) = (e^x - 1) / x where a w is small. Far from w = 0 the class adds
//   (slope - (p^s - q^s) / s) / b = ((q^s - q^a p^b) / b + (p^s - q^s) / s) / a
// of which the one is taken that divides by the larger of a and b. Conditions are one after the other: of nested ones
// no vectors are made.
//
// kAscending: b is known to be no less than a, as it mostly is; then loss and slope take the same step.
template <class T, bool kAscending = false>
struct AlphaBeta {
  using Ascending = AlphaBeta<T, true>;
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  static constexpr Given kGiven = Given::kLogs;
  static constexpr int kTerms = sizeof(T) == 4 ? 7 : 13;
  T a, b, s, over_a, over_s;     // 1 / x; of an x of 0: 0
  T less, over_less, over_more;  // the smaller of a and b, and of both 1 / x
  T sign;                        // 1 where a is the smaller, else -1: the sides are exchanged
  T endless_a, endless_less;     // of a power of 0: what (p^s - q^a p^b) over it comes to where q = 0
  T c[kTerms];

  FASTKD_HD explicit AlphaBeta(double alpha = 0, double beta = 0) : a(T(alpha)), b(T(beta)), s(T(alpha + beta)) {
    const bool by_beta = beta >= alpha;
    const double smaller = by_beta ? alpha : beta, larger = by_beta ? beta : alpha;
    over_a = alpha > 0 ? T(1 / alpha) : T(0);
    over_s = alpha + beta > 0 ? T(1 / (alpha + beta)) : T(0);
    less = T(smaller);
    sign = T(by_beta ? 1 : -1);
    over_less = smaller > 0 ? T(1 / smaller) : T(0);
    over_more = larger > 0 ? T(1 / larger) : T(0);
    endless_a = alpha > 0 ? T(0) : kInf<T>;
    endless_less = smaller > 0 ? T(0) : kInf<T>;
    double products = 1, power = 1, factorial = 2;
    for (int k = 0; k < kTerms; ++k) {
      c[k] = T(products / factorial);
      power *= beta;
      products = products * (alpha + beta) + power;
      factorial *= k + 3;
    }
  }

  FASTKD_HD T loss(Element<T> e) const {
    const T log_p = known(e.p), log_q = known(e.q);
    const T of_p = power(s * log_p), of_q = power(s * log_q), both = power(a * log_q + b * log_p);
    const T z = s * e.w;
    const bool near = z * z < T(0.09);
    const T w = near ? e.w : T(0);
    T series = c[kTerms - 1];
    for (int i = kTerms - 2; i >= 0; --i) series = series * w + c[i];
    T far;
    if constexpr (kAscending) {
      far = (step(of_p, both, e.w, a, over_a, endless_a) - (of_p - of_q) * over_s) * over_more;
    } else {
      const T over = step(sign > T(0) ? of_p : of_q, both, sign * e.w, less, over_less, endless_less);
      far = (over - sign * ((of_p - of_q) * over_s)) * over_more;
    }
    far = s > T(0) ? far : e.w * e.w;  // of one side alone: +inf
    const T close = of_q * (w * w * series);
    const T found = near ? close : far;
    return log_p + log_q <= 2 * kNothing ? T(0) : found;
  }
  FASTKD_HD T slope(Element<T> e) const {
    const T log_p = known(e.p), log_q = known(e.q);
    const T both = power(a * log_q + b * log_p);
    const T found = step(power(s * log_p), both, e.w, a, over_a, endless_a);
    const T square = s > T(0) ? T(0) : e.w * e.w;
    const T ends = square == kInf<T> ? kInf<T> : found;
    return log_p + log_q <= 2 * kNothing ? T(0) : ends;
  }

 private:
  static constexpr T kNothing = T(-1e30);  // of a probability of 0: 0 times it is 0
  static FASTKD_HD T known(T log) { return log < kNothing ? kNothing : log; }
  static FASTKD_HD T power(T x) { return exp2_scaled(x, kLog2e<T>, exp2_lowest(kLog2e<T>)); }
  // (x^s - q^a p^b) / exponent, with w the logarithm of what x is more than the other side. Where the exponent is 0 and
  // there is no other side it is +inf.
  static FASTKD_HD T step(T powered, T both, T w, T exponent, T over, T endless) {
    const T x = exponent * w;
    const T close = both * w * (T(1) + x * bregman_series(x));
    const T alone = w > T(0) ? endless : T(0);
    const T far = (powered - both) * over + alone;
    return x * x < T(0.09) ? close : far;
  }
};

}  // namespace fastkd::FASTKD_ISA
