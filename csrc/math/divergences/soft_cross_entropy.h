#pragma once
#include "math/divergences/kl_div.h"

namespace fastkd::FASTKD_ISA {

// -sum q log p = KL(q || p) + H(q): both are sums of terms >= 0.
template <class T>
struct SoftCrossEntropy : ForwardKL<T> {
  static constexpr bool kTeacherEntropy = true;
  using ForwardKL<T>::ForwardKL;
};

}  // namespace fastkd::FASTKD_ISA
