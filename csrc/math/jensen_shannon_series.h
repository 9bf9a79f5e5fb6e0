// The power series of the Jensen-Shannon divergence around p = q. Computed once a call, on the host.
#pragma once
#include <algorithm>
#include <limits>

#include "common/params.h"

namespace fastkd {

// v(w) = log((1 - beta) + beta e^-w) = sum_n kappa_n (-w)^n / n!, kappa_n the cumulants of a coin
// that shows 1 with probability beta: kappa_1 = beta, kappa_{n+1} = beta (1 - beta) d kappa_n / d beta.
// loss / q = -beta w - v(w) (beta + (1 - beta) e^w), which begins with w^2.
// Kept: v / w and loss / (q w^2). Both functions are analytic for |w| < pi: at |w| < 0.3 what
// is left out is below 1e-7 (float) and 1e-16 (double) of the whole.
template <class T>
DivergenceParameter<T> jensen_shannon_parameter(double beta) {
  constexpr int kTerms = DivergenceParameter<T>::kTerms, kOrder = kTerms + 2;
  double v[kOrder] = {}, mixed[kOrder];  // by powers of w
  double kappa[kOrder + 1] = {0, 1};     // kappa_n as a polynomial in beta
  double factorial = 1;
  mixed[0] = 1;
  for (int n = 1; n < kOrder; ++n) {
    factorial *= n;
    mixed[n] = (1 - beta) / factorial;
    double value = 0;
    for (int i = kOrder; i >= 0; --i) value = value * beta + kappa[i];
    v[n] = (n % 2 ? -value : value) / factorial;
    double next[kOrder + 1] = {};  // (beta - beta^2) d/dbeta
    for (int i = 1; i <= kOrder; ++i) {
      next[i] += i * kappa[i];
      if (i < kOrder) next[i + 1] -= i * kappa[i];
    }
    for (int i = 0; i <= kOrder; ++i) kappa[i] = next[i];
  }
  DivergenceParameter<T> p{};
  // not 0, so that m is not where p or q is not
  p.value = std::max(T(beta), std::numeric_limits<T>::min());
  p.rest = std::max(T(1 - beta), std::numeric_limits<T>::min());
  for (int n = 0; n < kTerms; ++n) {
    double loss = 0;
    for (int i = 1; i <= n + 2 && i < kOrder; ++i) loss -= v[i] * mixed[n + 2 - i];
    p.loss_series[n] = T(loss);
    p.slope_series[n] = T(v[n + 1]);
  }
  return p;
}

template <class T>
DivergenceParameter<T> divergence_parameter(Divergence which, double value) {
  return which == Divergence::kJensenShannon ? jensen_shannon_parameter<T>(value) : DivergenceParameter<T>{};
}

}  // namespace fastkd
