#pragma once
#include "math/divergences/kl_div.h"
#include "math/divergences/reverse_kl_div.h"

namespace fastkd::FASTKD_ISA {

// (1 - s) KL(q || p) + s KL(p || q), class by class.
template <class T>
struct SymmetricKL {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  using AtZero = ForwardKLEnd<T>;
  using AtOne = ReverseKL<T>;
  T student, rest;  // the weight of KL(p || q), and that of KL(q || p)
  FASTKD_HD explicit SymmetricKL(double parameter)
      : student(share_of_mixture(T(parameter))), rest(share_of_mixture(T(1 - parameter))) {}

  FASTKD_HD T loss(Element<T> e) const { return rest * ForwardKL<T>().loss(e) + student * ReverseKL<T>().loss(e); }
  FASTKD_HD T slope(Element<T> e) const { return rest * ForwardKL<T>().slope(e) + student * ReverseKL<T>().slope(e); }
};

}  // namespace fastkd::FASTKD_ISA
