// Distributions over two classes, one and the rest, from their log odds: a coin.
#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// What a student with log odds a and a teacher with log odds b give the one class and the rest. Of these two that is
// looked at which the teacher finds no likelier than the other, so that q = 1 / (1 + e^-b) is a half at most: where
// b > 0 they are exchanged. Student and teacher agree as far as d = a - b is known to be small. F(x) = log(1 + e^x):
//   KL(q || p) = F(a) - F(b) - q d = log(1 + u) - u + q (e^d - 1 - d),  u = q (e^d - 1),
//   p - q = q (1 - q) (e^d - 1) / (1 + u)
// of which the first is right where d is large, and of the others next to nothing cancels where it is small.
template <class T>
struct TwoClasses {
  bool exchanged;
  T a, b, d;
  T p, q, p_rest, q_rest;      // 1 - p and 1 - q have digits of their own
  T log_student, log_teacher;  // log(1 + e^-|a|), log(1 + e^-|b|)

  FASTKD_HD TwoClasses(T log_odds, T of_teacher, T difference)
      : exchanged(of_teacher > T(0)),
        a(exchanged ? -log_odds : log_odds),
        b(exchanged ? -of_teacher : of_teacher),
        d(exchanged ? -difference : difference) {
    d = d - d == T(0) ? d : a - b;  // where a side is certain of a class, the row's others have no difference
    const T x = exp_of_minus(magnitude(a)), y = exp_of_minus(-b);
    const Likelier student(x), teacher(y);
    p = a > T(0) ? student.probability : x * student.probability;
    q = y * teacher.probability;
    p_rest = a > T(0) ? x * student.probability : student.probability;
    q_rest = teacher.probability;
    log_student = student.minus_log;
    log_teacher = teacher.minus_log;
  }

  // KL(q || p), and its derivative by the log odds, which is p - q.
  FASTKD_HD T loss() const {
    const Grown g(*this);
    const T close = q * g.beyond - g.u * g.r + 2 * g.r * (g.r * g.r) * atanh_tail(g.r * g.r);
    // never 0 * inf
    const T of_teacher = q > T(0) ? q * b : T(0), of_both = q > T(0) ? q * d : T(0);
    const T far = (a > T(0) ? a * q_rest + of_teacher : -of_both) + (log_student - log_teacher);
    return is_close(d) ? close : far;
  }
  FASTKD_HD T slope() const {
    const Grown g(*this);
    const T found = is_close(d) ? q * q_rest * g.grown * g.over : p - q;
    return exchanged ? -found : found;
  }
  // Of the one class, and of the rest.
  FASTKD_HD T q_of_one() const { return exchanged ? q_rest : q; }
  FASTKD_HD T p_of_rest() const { return exchanged ? p : p_rest; }
  FASTKD_HD T minus_log_of_one() const {
    const T against = exchanged ? a : -a;
    return (against > T(0) ? against : T(0)) + log_student;
  }

 private:
  // Of log odds x = e^-|log odds|: the likelier class's probability 1 / (1 + x), and -log of it, with one division.
  struct Likelier {
    T probability, minus_log;

    FASTKD_HD explicit Likelier(T x) {
      const bool more = x > T(0.5);  // log(1 + x) = log 2 + log((1 + x) / 2)
      const T sum = T(1) + x, other = x + (more ? T(3) : T(2)), over = T(1) / (sum * other);
      const T r = (more ? x - T(1) : x) * sum * over;
      probability = other * over;
      minus_log = (more ? T(0.69314718055994530942) : T(0)) + 2 * (r + r * (r * r) * atanh_tail(r * r));
    }
  };
  // Where d is small: e^d - 1, e^d - 1 - d, u, 1 / (1 + u), and r = u / (2 + u), of which log(1 + u) = 2 atanh(r).
  struct Grown {
    T grown, beyond, u, over, r;

    FASTKD_HD explicit Grown(const TwoClasses& k) {
      const T w = is_close(k.d) ? k.d : T(0);
      beyond = w * w * bregman_series_to_0_7(w);
      grown = w + beyond;
      u = k.q * grown;
      const T both = T(1) / ((T(1) + u) * (T(2) + u));
      over = (T(2) + u) * both;
      r = u * (T(1) + u) * both;
    }
  };
  static FASTKD_HD bool is_close(T d) { return d * d < T(0.49); }
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
