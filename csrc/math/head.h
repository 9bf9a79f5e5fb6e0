// The teacher's head: the classes t > bound, for the largest logit bound below the best whose classes and all above it
// have more mass than the head may have. Found by halving, without a sort: a step splits what may be the bound in the
// middle, and asks for the mass above, the least logit above and the largest below.
#pragma once
#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {

// The mass of a class: e^((t - max) / T_teacher) as a whole number, so that sums do not depend on their order. Those of
// up to 2^23 classes fit.
template <class T>
inline constexpr T kMassOfBest = sizeof(T) == 8 ? T(1ull << 40) : T(1u << 30);
FASTKD_HD uint32_t mass_of(float e) { return uint32_t(int32_t(e * kMassOfBest<float> + 0.5f)); }
FASTKD_HD uint64_t mass_of(double e) { return uint64_t(int64_t(e * kMassOfBest<double> + 0.5)); }

// What all classes of a head have at most.
FASTKD_HD uint64_t mass_limit(double mu, uint64_t total) { return uint64_t(mu * double(total)); }

// Logits of a row between which the bound lies: the least one is a bound that is too low, or right; what is above the
// largest is too high.
template <class T>
struct HeadRange {
  T least, largest;

  FASTKD_HD bool open() const { return least < largest; }
  FASTKD_HD T middle() const {  // at least the least, and below the largest
    const T x = T(0.5) * least + T(0.5) * largest;
    return !(x < largest) || x < least ? least : x;
  }
  // Whether the bound is above the middle.
  FASTKD_HD bool narrow(uint64_t mass_above, uint64_t limit, T least_above, T largest_below) {
    const bool higher = mass_above > limit;
    least = higher ? least_above : least;
    largest = higher ? largest : largest_below;
    return higher;
  }
};

// The share of all differences that lies in the tail; 1/2 where there are none, or a NaN among them.
FASTKD_HD double share_of_tail(double head, double tail) {
  const double total = head + tail;
  return total > 0 && total < kInf<double> ? tail / total : 0.5;
}

}  // namespace fastkd::FASTKD_ISA
