#pragma once
#include "math/divergences/total_variation.h"

namespace fastkd::FASTKD_ISA {

// -log A with A = sum min(p, q) = 1 - total variation: whichever of the two sums is the smaller knows it best. Slope
// -p / A where p < q, of which the factor 1 / A is the row's: where A is small so are these, and nothing cancels.
template <class T>
struct NegativeLogAcceptance : TotalVariation<T> {
  using InDouble = NegativeLogAcceptance<double>;
  FASTKD_HD explicit NegativeLogAcceptance(double = 0) {}

  FASTKD_HD T slope(Element<T> e) const {
    const T below = e.w < T(0) ? -e.p : T(0);
    return e.w == e.w ? below : e.p - e.q;
  }
  FASTKD_HD T second(Element<T> e) const { return e.p > e.q ? e.q : e.p; }

  // What the sums of a row's classes come to, and what its slopes are multiplied by. Of disjoint p and q: +inf, and no
  // gradient.
  static FASTKD_HD RowOfSums<T> row(T total_variation, T acceptance) {
    if (!(total_variation == total_variation)) return {total_variation, total_variation};
    const T near = -log_ratio(T(1) - total_variation, T(1), -total_variation).log;
    const T far = -log_ratio(acceptance, T(1), acceptance - T(1)).log;
    const T loss = total_variation < T(0.5) ? near : far;
    return acceptance == T(0) ? RowOfSums<T>{kInf<T>, T(0)} : RowOfSums<T>{loss, T(1) / acceptance};
  }
};

}  // namespace fastkd::FASTKD_ISA
