// Relations between two samples, and how to add one. A relation is a functor of what a pair contributes: of
// its measures s and t, those of the student's and of the teacher's pair, and of its weight w, the mean of
// those of its samples. A schedule computes squared distances and walks all ordered pairs of different
// samples up to three times:
//   1. per side the sum of measure(), where measures()
//   2. the sums of the loss and the slope that pair() adds
//   3. weight(), w_ij: the gradient is sum_j w_ij (x_i - x_j)
// A functor is made anew for each sweep, from the sums of those before it.
//
// What template <class T> class Name in namespace fastkd::FASTKD_ISA must have, all of it FASTKD_HD:
//   Name(const RelationOptions&, const RelationSums&)  options.N: of the samples that are there
//   static double loss_scale(options)                  the loss is this times the sum of the losses
//   static bool measures(options)                      whether it needs the sums of s and t
//   static T measure(T squared)                        the distance, with a floor: squared may be just below 0
//   void pair(T s, T t, T w, T& loss, T& slope)        adds; the slope is any sum over the pairs that weight() needs
//   T weight(T s, T t, T w)                            2 loss_scale w dloss/ds / s; both orders of a pair are in the 2
// The CUDA schedule (cuda/pairs_kernel.cuh) keeps it in shared memory: 64 bytes at the most, copied as they are.
//
// The CPU's schedule (cpu/pairs.cpp) saves the second walk, and asks for what says how:
//   static double unclamped_slope(options, sums)  what the slopes add up to, as far as the first sums tell
//   static bool matters(options, error, loss, tolerance)  whether that was too far off for the gradient
//   T slope_weight(T s, options)                  what corrects it then: of each 1 of the slopes' sum
// Without a slope they are 0, false and 0. There a sample meets itself, with s and t of 0: pair() and weight()
// must give 0 for it. And s * s must be d^2 again, from which near pairs are told.
//
// Its name goes into FASTKD_FOR_EACH_RELATION (common/embeddings_params.h), its number into
// fastkd/ops/relations.py. Or, without a change here, into FASTKD_MORE_RELATIONS(X) of a header that both the
// schedule's sources are compiled with (-include), in a FASTKD_NAMESPACE of its own:
// tests/test_extension_cpp.py does.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/inline.h"
#include "math/distance.h"

namespace fastkd {

struct RelationOptions {
  double delta;
  bool normalize;
  int64_t N;

  FASTKD_HD double pairs() const { return double(N) * double(N - 1); }
};

// Sums over the ordered pairs; 0 where they are not known yet.
struct RelationSums {
  double student = 0, teacher = 0;          // of the measures s and t
  double student_squared = 0, product = 0;  // of w s^2 and w s t; on the CPU
  double loss = 0, slope = 0;

  FASTKD_HD void add(const RelationSums& o, double times) {
    student += times * o.student;
    teacher += times * o.teacher;
    student_squared += times * o.student_squared;
    product += times * o.product;
    loss += times * o.loss;
    slope += times * o.slope;
  }
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

FASTKD_HD float square_root(float x) { return sqrtf(x); }
FASTKD_HD double square_root(double x) { return sqrt(x); }

// loss = 1/N^2 sum w huber(e), e = u - v; u = d_s / mean d_s, v = d_t / mean d_t, d = sqrt(max(d^2, 1e-12)).
// With r = clamp(e, +-delta) and C the mean of w r u, which comes from the student's mean:
// w_ij = 2 / (N^2 mean d_s) (w r - C) / d_s.
template <class T>
class RkdDistance {
 public:
  FASTKD_HD RkdDistance(const RelationOptions& options, const RelationSums& sums)
      : delta_(T(options.delta)), inv_student_(1), inv_teacher_(1), slope_mean_(0) {
    const double N = double(options.N);
    double inv_student = 1;
    if (options.normalize) {
      inv_student = options.pairs() / sums.student;
      inv_student_ = T(inv_student);
      inv_teacher_ = T(options.pairs() / sums.teacher);
      slope_mean_ = T(sums.slope / options.pairs());
    }
    scale_ = T(2 / (N * N) * inv_student);
  }

  // Of the sum of the losses.
  FASTKD_HD static double loss_scale(const RelationOptions& options) { return 1 / (double(options.N) * options.N); }
  FASTKD_HD static bool measures(const RelationOptions& options) { return options.normalize; }

  FASTKD_HD static T measure(T squared) {
    return square_root(squared < kMinSquaredDistance<T> ? kMinSquaredDistance<T> : squared);
  }

  FASTKD_HD void pair(T s, T t, T w, T& loss, T& slope) const {
    const T u = s * inv_student_, e = u - t * inv_teacher_, r = clamp(e);
    loss += w * (r * (e - r / 2));
    slope += w * (r * u);
  }

  FASTKD_HD T weight(T s, T t, T w) const {
    const T of_pair = scale_ * (w * clamp(s * inv_student_ - t * inv_teacher_) - slope_mean_) / s;
    return s <= square_root(kMinSquaredDistance<T>) ? T(0) : of_pair;  // torch.clamp has no gradient below its floor
  }

  // The sum of w (u^2 - u v): what the slopes add up to unless a pair is clamped.
  FASTKD_HD static double unclamped_slope(const RelationOptions& options, const RelationSums& sums) {
    if (!options.normalize) return 0;
    const double u = T(options.pairs() / sums.student), v = T(options.pairs() / sums.teacher);  // as pair() has them
    return u * (sums.student_squared * u - sums.product * v);
  }
  // What each 1 of the slopes' sum adds to weight().
  FASTKD_HD T slope_weight(T s, const RelationOptions& options) const {
    const T w = -scale_ / (T(options.pairs()) * s);
    return s <= square_root(kMinSquaredDistance<T>) ? T(0) : w;
  }
  // Whether a slopes' sum that is wrong by `error` changes the gradient by more than `tolerance` of it, at
  // the most: over j that grows like N, and the r of a pair, which have both signs, like the root of N.
  FASTKD_HD static bool matters(const RelationOptions& options, double error, double loss, double tolerance) {
    if (!options.normalize) return false;
    const double C = error / options.pairs();
    return (C < 0 ? -C : C) * sqrt(double(options.N)) > tolerance * sqrt(2 * loss * loss_scale(options));
  }

 private:
  FASTKD_HD T clamp(T e) const {
    const T below = e > delta_ ? delta_ : e;  // in this order a NaN stays
    return below < -delta_ ? -delta_ : below;
  }

  T delta_, inv_student_, inv_teacher_, slope_mean_, scale_;
};

}  // namespace fastkd::FASTKD_ISA
