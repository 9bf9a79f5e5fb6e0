// Probabilistic knowledge transfer: what one sample's probability of another contributes.
//
//   s, t: the student's and the teacher's, k / r with k = (cos + 1) / 2 and r the sum of a sample's k
//   loss = sum t log((t + eps) / (s + eps)), in terms that are of second order in s - t, whose sum is 0
//   dL/dk = (a - sum over the sample of s a) / r, a = 1 - t / (s + eps)
#pragma once
#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {

// 1/2 (cos + 1) of two samples; valid: 1 where both are there, else 0, as is their cosine.
template <class T>
FASTKD_HD T pkt_similarity(T cosine, T valid) {
  const T k = T(0.5) * (cosine + valid);
  return k < 0 ? T(0) : k;  // of opposite directions rounding may leave less; in this order a NaN stays
}

// Returns a. Adds weight times the loss, and s a.
template <class T>
FASTKD_HD T pkt_pair(T s, T t, T eps, T weight, T& loss, T& slope) {
  const T d = s - t, v = s + eps, u = t + eps;
  const T a = (d + eps) / v;
  loss += weight * (d - t * log_ratio(v, u, d).log);
  slope += s * a;
  return a;
}

}  // namespace fastkd::FASTKD_ISA
