#pragma once
#include "math/divergences/kl_div.h"

namespace fastkd::FASTKD_ISA {

// KL(q || p) between the classes beside a row's target, each side renormalized without it. Those of a loss that wants
// the cross-entropy in its place add the teacher's entropy.
template <class T>
struct NonTargetKL : ForwardKL<T> {
  static constexpr bool kTeacherEntropy = true;
  struct WithoutTarget;
  FASTKD_HD explicit NonTargetKL(double = 0) {}
};

// Whether the target is none of the classes that a divergence is between.
template <class D>
inline constexpr bool kWithoutTarget = requires { typename D::WithoutTarget; };

}  // namespace fastkd::FASTKD_ISA
