#pragma once
#include "math/two_classes.h"

namespace fastkd::FASTKD_ISA {

// Every class is a coin: sum KL(coin of the teacher || coin of the student), and the slope is that by the student's log
// odds. There is no softmax.
template <class T>
struct BernoulliKL {
  static constexpr bool kCentred = true, kTeacherEntropy = false;
  static constexpr Given kGiven = Given::kLogOdds;
  FASTKD_HD explicit BernoulliKL(double = 0) {}

  FASTKD_HD T loss(Element<T> e) const { return TwoClasses<T>(e.p, e.q, e.w).loss(); }
  FASTKD_HD T slope(Element<T> e) const { return TwoClasses<T>(e.p, e.q, e.w).slope(); }
};

}  // namespace fastkd::FASTKD_ISA
