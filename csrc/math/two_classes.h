// Distributions over two classes, one and the rest, from their log odds: a coin.
#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// What a student with log odds a and a teacher with log odds b give the one class and the rest. Of these two that is
// looked at which the teacher finds no likelier than the other, so that q = 1 / (1 + e^-b) is a half at most: where
// b > 0 they are exchanged. Student and teacher agree as far as d = a - b is known to be small. F(x) = log(1 + e^x):
//   KL(q || p) = F(a) - F(b) - q d = log(1 + u) - u + q (e^d - 1 - d),  u = q (e^d - 1) = (p - q) / (1 - p)
//   p - q = q (1 - p) (e^d - 1)
// of which the first is right where d is large, and of the others next to nothing cancels where it is small. Either way
// there is one logarithm, of a ratio between a half and two: (1 + e^-|a|) / (1 + e^-|b|), or 1 + u = (1 - q) / (1 - p).
template <class T>
struct TwoClasses {
  bool exchanged, close;
  T a, b, d;
  T x, y;                  // e^-|a|, e^-|b|
  T p, q, p_rest, q_rest;  // 1 - p and 1 - q have digits of their own
  T beyond, grown;         // e^d - 1 - d and e^d - 1, where d is small

  FASTKD_HD TwoClasses(T log_odds, T of_teacher, T difference)
      : exchanged(of_teacher > T(0)),
        a(exchanged ? -log_odds : log_odds),
        b(exchanged ? -of_teacher : of_teacher),
        d(exchanged ? -difference : difference) {
    d = d - d == T(0) ? d : a - b;  // where a side is certain of a class, the row's others have no difference
    close = d * d < T(0.49);
    x = exp_of_minus(magnitude(a));
    y = exp_of_minus(-b);
    const T over = T(1) / ((T(1) + x) * (T(1) + y)), likelier = (T(1) + y) * over;
    p = a > T(0) ? likelier : x * likelier;
    p_rest = a > T(0) ? x * likelier : likelier;
    q_rest = (T(1) + x) * over;
    q = y * q_rest;
    const T w = close ? d : T(0);
    beyond = w * w * bregman_series_to_0_7(w);
    grown = w + beyond;
  }

  // KL(q || p), and its derivative by the log odds, which is p - q.
  FASTKD_HD T loss() const {
    // u / (2 + u), or that of the other ratio; not out of p and q: one division need not wait for the other
    const T of_u = y * grown, below = (T(1) + y) + (close ? (T(1) + y) + of_u : T(1) + x);
    const T r = (close ? of_u : x - y) / below;
    const T tail = 2 * r * (r * r) * atanh_tail_to_third(r * r);
    // never 0 * inf
    const T of_teacher = q > T(0) ? q * b : T(0), of_both = q > T(0) ? q * d : T(0);
    const T far = (a > T(0) ? a * q_rest + of_teacher : -of_both) + (2 * r + tail);
    return close ? q * beyond - q * grown * r + tail : far;
  }
  FASTKD_HD T slope() const { return exchanged ? -moved() : moved(); }
  // Of the one class, and of the rest.
  FASTKD_HD T q_of_one() const { return exchanged ? q_rest : q; }
  FASTKD_HD T p_of_rest() const { return exchanged ? p : p_rest; }
  FASTKD_HD T minus_log_of_one() const {
    const T against = exchanged ? a : -a, r = x / (x + T(2));
    return (against > T(0) ? against : T(0)) + 2 * (r + r * (r * r) * atanh_tail_to_third(r * r));
  }

 private:
  FASTKD_HD T moved() const { return close ? q * p_rest * grown : p - q; }
  static FASTKD_HD T magnitude(T x) { return x < T(0) ? -x : x; }
  static FASTKD_HD T exp_of_minus(T x) { return exp2_scaled(-x, kLog2e<T>, exp2_lowest(kLog2e<T>)); }
};

// The part that a row's target has in its loss, and the factor of its gradient; see TargetLoss. a, b and d are those of
// TwoClasses; of a normalized loss they are taken at temperature 1.
template <class T>
struct TargetPart {
  T loss, factor;

  static FASTKD_HD TargetPart of(bool decoupled, T a, T b, T d) {
    const TwoClasses<T> k(a, b, d);
    if (decoupled) return {k.loss(), -k.slope()};
    const T q = k.q_of_one();
    return {q == T(0) ? T(0) : q * k.minus_log_of_one(), q * k.p_of_rest()};
  }
};

}  // namespace fastkd::FASTKD_ISA
