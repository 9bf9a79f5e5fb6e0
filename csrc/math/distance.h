// What distances between samples have in common, whatever the schedule and the device: which pairs are near, and from
// which distance on two samples are the same.
//
// From an inner product, d^2 = |x|^2 + |y|^2 - 2 x y. The product's roundings are some multiple e of |x|^2 + |y|^2, so
// that d^2 is wrong by e / share of itself, and d by half of that, where share = d^2 / (|x|^2 + |y|^2). A pair whose
// share is less than kNear is near: its d is computed from the difference of both rows, and so is its part of the
// gradient. Fewer pairs are near with a smaller kNear, and they cost D each.
#pragma once
#include "common/inline.h"

namespace fastkd {

// In float a single rounding has an e of 2^-24, which leaves d right to 2^-17 = 8e-6 at the worst pair. A product has
// one rounding for each feature, which mostly cancel, as do those of the pairs in a loss: tests/test_relations.py holds
// all relations to the 5e-6 that is promised, on several code paths of the BLAS. Double has digits to spare.
template <class T>
inline constexpr T kNear = T(1) / 256;

// Of products on the tensor cores, by the dtype of the embeddings. Those of float are three of TF32, whose e is 2^-22:
// 1 / 256 reaches 9e-6. Those of half precision are exact up to the sums, but their rows are not centred first: with a
// larger share more pairs would be near.
template <class S>
inline constexpr float kNearTensorCores = sizeof(S) == 4 ? 1.0f / 64 : 1.0f / 1024;

// The distance of samples that are equal, or nearer than this: they have no gradient from each other. As published.
template <class T>
inline constexpr T kMinDistance = T(1e-6);
template <class T>
inline constexpr T kMinSquaredDistance = kMinDistance<T> * kMinDistance<T>;  // its root is kMinDistance again

// Of RKD's angles: below this squared distance a pair has no direction. That is the eps of F.normalize, as published.
inline constexpr double kMinSquaredLength = 1e-24;

}  // namespace fastkd
