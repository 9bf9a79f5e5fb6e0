// Distributions over two classes, one and the rest, from their log odds: a coin.
#pragma once
#include "math/divergences/kl_div.h"

namespace fastkd::FASTKD_ISA {

// What a student with log odds a and a teacher with log odds b give the one class and the rest: p = 1 / (1 + e^-a),
// and 1 - p, which has digits of its own. Student and teacher agree as far as d = a - b is known to be small.
template <class T>
struct TwoClasses {
  Element<T> one, rest;
  T minus_log_one;  // -log p of the one class

  FASTKD_HD TwoClasses(T a, T b, T d) {
    const T x = exp_of_minus(magnitude(a)), y = exp_of_minus(magnitude(b));
    const T log_x = log_1_and(x), log_y = log_1_and(y);
    const T p = T(1) / (T(1) + x), q = T(1) / (T(1) + y);
    one.p = a > T(0) ? p : x * p;
    rest.p = a > T(0) ? x * p : p;
    one.q = b > T(0) ? q : y * q;
    rest.q = b > T(0) ? y * q : q;
    minus_log_one = below_0(a) + log_x;
    // log(p / q) near convergence: p / q = 1 / (1 + q_rest (e^-d - 1)), of which nothing cancels
    const bool near = is_near(d);
    const T far_one = below_0(b) - below_0(a) + (log_y - log_x);
    const T far_rest = below_0(-b) - below_0(-a) + (log_y - log_x);
    const T small = near ? d : T(0);
    one.w = near ? -log_1_and(rest.q * expm1_series(-small)) : far_one;
    rest.w = near ? -log_1_and(one.q * expm1_series(small)) : far_rest;
  }
  // KL(q || p), and its derivative by a, which is p - q.
  FASTKD_HD T loss() const { return ForwardKL<T>().loss(one) + ForwardKL<T>().loss(rest); }
  FASTKD_HD T slope() const { return one.p < rest.p ? ForwardKL<T>().slope(one) : -ForwardKL<T>().slope(rest); }

 private:
  static FASTKD_HD T magnitude(T x) { return x < T(0) ? -x : x; }
  static FASTKD_HD T below_0(T x) { return x < T(0) ? -x : T(0); }
  static FASTKD_HD T exp_of_minus(T x) { return exp2_scaled(-x, kLog2e<T>, exp2_lowest(kLog2e<T>)); }
  static FASTKD_HD T log_1_and(T x) { return log_ratio(T(1) + x, T(1), x).log; }
};

// The part that a row's target has in its loss, and the factor of its gradient; see TargetLoss. a, b and d are those of
// TwoClasses; of a normalized loss they are taken at temperature 1.
template <class T>
struct TargetPart {
  T loss, factor;

  static FASTKD_HD TargetPart of(bool decoupled, T a, T b, T d) {
    const TwoClasses<T> k(a, b, d);
    if (decoupled) return {k.loss(), -k.slope()};
    return {k.one.q == T(0) ? T(0) : k.one.q * k.minus_log_one, k.one.q * k.rest.p};
  }
};

}  // namespace fastkd::FASTKD_ISA
