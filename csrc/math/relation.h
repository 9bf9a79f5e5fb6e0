// Relations between two samples: what a pair contributes, from the squared distances s of the
// student's pair and t of the teacher's. A schedule walks all ordered pairs of different samples up
// to three times:
//   1. per side the sum of measure(), where measures()
//   2. the sums of loss() and slope()
//   3. weight(), w_ij: the gradient is sum_j w_ij (x_i - x_j)
// A functor is made anew for each sweep, from the sums of those before it.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

struct RelationOptions {
  double delta;
  bool normalize;
  int64_t N;
};

// Sums over the pairs; 0 where they are not known yet.
struct RelationSums {
  double student, teacher;  // of measure()
  double loss, slope;
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

FASTKD_HD float square_root(float x) { return sqrtf(x); }
FASTKD_HD double square_root(double x) { return sqrt(x); }

// loss = 1/N^2 sum huber(e), e = u - v; u = d_s / mean d_s, v = d_t / mean d_t, d = sqrt(max(s, 1e-12)).
// With r = clamp(e, +-delta) and C the mean of r u, which comes from the student's mean:
// w = 2 / (N^2 mean d_s) (r - C) / d_s.
template <class T>
class RkdDistance {
 public:
  FASTKD_HD RkdDistance(const RelationOptions& options, const RelationSums& sums)
      : delta_(T(options.delta)), inv_student_(1), inv_teacher_(1), slope_mean_(0) {
    const double N = double(options.N), pairs = N * (N - 1);
    double inv_student = 1;
    if (options.normalize) {
      inv_student = pairs / sums.student;
      inv_student_ = T(inv_student);
      inv_teacher_ = T(pairs / sums.teacher);
      slope_mean_ = T(sums.slope / pairs);
    }
    scale_ = T(2 / (N * N) * inv_student);
  }

  // Of the sum of loss().
  FASTKD_HD static double loss_scale(const RelationOptions& options) { return 1 / (double(options.N) * options.N); }
  FASTKD_HD static bool measures(const RelationOptions& options) { return options.normalize; }

  FASTKD_HD static T measure(T squared) { return square_root(squared < kLeast ? kLeast : squared); }

  FASTKD_HD void pair(T s, T t, T& loss, T& slope) const {
    const T u = measure(s) * inv_student_, e = u - measure(t) * inv_teacher_, size = e < 0 ? -e : e;
    loss = size < delta_ ? e * e / 2 : delta_ * (size - delta_ / 2);
    slope = clamp(e) * u;
  }

  FASTKD_HD T weight(T s, T t) const {
    const T d = measure(s), e = d * inv_student_ - measure(t) * inv_teacher_;
    return s < kLeast ? T(0) : scale_ * (clamp(e) - slope_mean_) / d;  // torch.clamp has no gradient below its floor
  }

 private:
  static constexpr T kLeast = T(1e-12);

  FASTKD_HD T clamp(T e) const { return e < -delta_ ? -delta_ : e > delta_ ? delta_ : e; }

  T delta_, inv_student_, inv_teacher_, slope_mean_, scale_;
};

}  // namespace fastkd::FASTKD_ISA
