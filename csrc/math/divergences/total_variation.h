#pragma once
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// 1/2 sum |p - q| = 1/2 sum q |e^w - 1|. Slope p sign(p - q) / 2, which is 0 where p = q. Where w is NaN p and q are 0,
// or one of them is NaN: p - q is what both want.
template <class T>
struct TotalVariation {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  FASTKD_HD explicit TotalVariation(double = 0) {}

  FASTKD_HD T loss(Element<T> e) const {
    const T difference = is_near(e.w) ? e.q * expm1_series(e.w) : e.p - e.q;
    return T(0.5) * (difference < T(0) ? -difference : difference);
  }
  FASTKD_HD T slope(Element<T> e) const {
    const T half = T(0.5) * e.p, below = e.w < T(0) ? -half : T(0);
    const T known = e.w > T(0) ? half : below;
    return e.w == e.w ? known : e.p - e.q;
  }
};

}  // namespace fastkd::FASTKD_ISA
