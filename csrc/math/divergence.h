// Divergences between a teacher's q and a student's p, class by class.
//
// A divergence D(q, p) = sum_j loss(e_j) tells the rows schedule about one class j
//   loss(e)   what it adds to the row's divergence, before the factor T^2
//   slope(e)  dD / d(log p_j), up to a multiple of p_j; with z = student / T
//             dD / dz_k = slope_k - p_k sum_j slope_j
// and about the whole row
//   kCentred         the slopes add up to 0, so their sum need not be known
//   kTeacherEntropy  the teacher's entropy -sum q log q is added to the loss
//   kGiven           what p and q are given as, if not as probabilities: see Given
//   second, row      if its loss is no sum over classes: another sum over them, and what the two sums come to
// It is made for each row from the row's parameters, which are 0 where it has none. Where by convention it is another
// divergence at a parameter of 0 or of 1, that one is its type AtZero or AtOne; and Ascending, on the CPU, is one that
// may count on its second parameter to be no less than the first.
// With w = log p - log q all are written so that nothing cancels when student and teacher
// agree: near convergence w is small and known to full precision, p - q is not.
#pragma once
#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {

// Logarithms are natural, and lose nothing where an exponential is too small for a number; then w is known as well.
// Log odds are the logits over their temperature, without a softmax.
enum class Given { kProbabilities, kLogs, kLogOdds };
template <class D>
constexpr Given given() {
  if constexpr (requires { D::kGiven; }) return D::kGiven;
  return Given::kProbabilities;
}

// Of a divergence whose loss is no sum over classes: the row's loss, and what its slopes are multiplied by.
template <class T>
struct RowOfSums {
  T loss, factor;
};
template <class D>
inline constexpr bool kTwoSums = requires { &D::second; };

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

// A share of a mixture m of p and q. Not 0, so that m is not 0 where p or q is not. Outside of [0, 1], and NaN: NaN.
template <class T>
FASTKD_HD T share_of_mixture(T share) {
  return share > kLeast<T> ? share : share >= T(0) ? kLeast<T> : kInf<T> - kInf<T>;
}

// f(functor) with the functor of a row. Outside of the loops over classes, which a branch would slow down.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class D, class F>
FASTKD_HD void with_functor(double parameter, double second, F&& f) {
  if constexpr (requires { typename D::AtZero; }) {
    if (parameter == 0) return f(typename D::AtZero());
  }
  if constexpr (requires { typename D::AtOne; }) {
    if (parameter == 1) return f(typename D::AtOne());
  }
  if constexpr (requires { D(parameter, second); }) {
    f(D(parameter, second));
  } else {
    f(D(parameter));
  }
}

}  // namespace fastkd::FASTKD_ISA
