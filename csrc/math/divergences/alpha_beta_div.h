#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// -1 / (a b) sum (q^a p^b - a / s q^s - b / s p^s) with s = a + b, and its limits where a, b or both are 0.
//
// Near w = 0 a class adds q^s w^2 sum_k c_k w^k with c_k = (s^(k+1) - b^(k+1)) / (a (k + 2)!), in which the quotient is
// the sum of the products s^i b^(k-i): nothing cancels, and a may be 0. Its slope is (p^s - q^a p^b) / a, which is
// q^a p^b w E(a w) with E(x) = (e^x - 1) / x where a w is small. Far from w = 0 the class adds
//   (slope - (p^s - q^s) / s) / b = ((q^s - q^a p^b) / b + (p^s - q^s) / s) / a
// of which the one is taken that divides by the larger of a and b.
template <class T>
struct AlphaBeta {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  static constexpr Given kGiven = Given::kLogs;
  static constexpr int kTerms = sizeof(T) == 4 ? 7 : 13;
  T a, b, s, over_a, over_b, over_s;  // 1 / x; of an x of 0: 0
  T c[kTerms];

  FASTKD_HD explicit AlphaBeta(double alpha = 0, double beta = 0) : a(T(alpha)), b(T(beta)), s(T(alpha + beta)) {
    over_a = alpha > 0 ? T(1 / alpha) : T(0);
    over_b = beta > 0 ? T(1 / beta) : T(0);
    over_s = alpha + beta > 0 ? T(1 / (alpha + beta)) : T(0);
    double products = 1, power = 1, factorial = 2;
    for (int k = 0; k < kTerms; ++k) {
      c[k] = T(products / factorial);
      power *= beta;
      products = products * (alpha + beta) + power;
      factorial *= k + 3;
    }
  }

  FASTKD_HD T loss(Element<T> e) const {
    const Powers k(*this, e);
    const bool near = (s * e.w) * (s * e.w) < T(0.09);
    const T w = near ? e.w : T(0);
    T series = c[kTerms - 1];
    for (int i = kTerms - 2; i >= 0; --i) series = series * w + c[i];
    const T of_sums = (k.p - k.q) * over_s;
    const T by_b = (step(k, e.w) - of_sums) * over_b, by_a = (step_back(k, e.w) + of_sums) * over_a;
    const T far = b < a ? by_a : by_b;
    const T farther = s == T(0) ? e.w * e.w : far;  // of one side alone: +inf
    return k.none ? T(0) : near ? k.q * (w * w * series) : farther;
  }
  FASTKD_HD T slope(Element<T> e) const {
    const Powers k(*this, e);
    const bool endless = s == T(0) && e.w * e.w == kInf<T>;
    return k.none ? T(0) : endless ? kInf<T> : step(k, e.w);
  }

 private:
  struct Powers {
    T p, q, both;  // p^s, q^s, q^a p^b
    bool none;     // p = q = 0
    FASTKD_HD Powers(const AlphaBeta& of, Element<T> e) {
      const T least = T(-1e30);  // 0 times it is 0
      const T log_p = e.p > least    ? e.p
                      : e.p <= least ? least
                                     : e.p,
              log_q = e.q > least    ? e.q
                      : e.q <= least ? least
                                     : e.q;
      none = log_p == least && log_q == least;
      p = power(of.s * log_p);
      q = power(of.s * log_q);
      both = power(of.a * log_q + of.b * log_p);
    }
    static FASTKD_HD T power(T x) { return exp2_scaled(x, kLog2e<T>, exp2_lowest(kLog2e<T>)); }
  };
  // (e^x - 1) / x, |x| < 0.3
  static FASTKD_HD T growth(T x) { return T(1) + x * bregman_series(x); }
  // (p^s - q^a p^b) / a. Of q = 0 it is +inf where a is 0.
  FASTKD_HD T step(const Powers& k, T w) const {
    const T x = a * w;
    const T far = a > T(0) ? (k.p - k.both) * over_a : w > T(0) ? kInf<T> : T(0);
    return x * x < T(0.09) ? k.both * w * growth(x) : far;
  }
  // (q^s - q^a p^b) / b. Of p = 0 it is +inf where b is 0.
  FASTKD_HD T step_back(const Powers& k, T w) const {
    const T x = -b * w;
    const T far = b > T(0) ? (k.q - k.both) * over_b : w < T(0) ? kInf<T> : T(0);
    return x * x < T(0.09) ? -(k.both * w * growth(x)) : far;
  }
};

}  // namespace fastkd::FASTKD_ISA
