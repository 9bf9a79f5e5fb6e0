// What a schedule is told: plain sizes, strides and pointers. No torch header reaches a kernel.
#pragma once
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

enum class DType : int32_t { kHalf, kBFloat16, kFloat, kDouble };

// The numbers are those of fastkd/ops/rows.py.
// Every divergence, as its functor of math/divergence.h is named.
#define FASTKD_FOR_EACH_DIVERGENCE(X) X(ForwardKL) X(SoftCrossEntropy) X(ReverseKL) X(JensenShannon)
#define FASTKD_ENUMERATOR(name) k##name,
enum class Divergence : int64_t { FASTKD_FOR_EACH_DIVERGENCE(FASTKD_ENUMERATOR) kCount };
enum class Reduction : int64_t { kNone, kSum, kBatchMean, kMean };

// What a divergence has beside p and q. Series in w for |w| < 0.3, by rising powers.
template <class T>
struct DivergenceParameter {
  static constexpr int kTerms = sizeof(T) == 8 ? 16 : 7;
  T value, rest;  // rest = 1 - value
  T loss_series[kTerms], slope_series[kTerms];
};

// Of a row, or a part of one: the maximum logit and the sum of e^((z - max) / T); and of the row
// the sum of its slopes. Saved for backward, [N, 5]. In double whatever is computed in: the sums'
// error is the whole row's.
struct RowsStats {
  double max_student, sum_student, max_teacher, sum_teacher, slope;
};

inline constexpr int kMaxLeadingDims = 16;

// A tensor [*, V] with any strides, seen as N rows.
struct RowsTensor {
  char* data;  // null when absent
  DType dtype;
  int32_t element_size;
  int32_t dims;                     // leading dimensions
  int64_t size[kMaxLeadingDims];    // [dims]
  int64_t stride[kMaxLeadingDims];  // [dims], in elements
  int64_t stride_v;                 // of the class dimension, in elements

  FASTKD_HD char* row(int64_t n) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      offset += n % size[d] * stride[d];
      n /= size[d];
    }
    if (dims > 0) offset += n * stride[0];
    return data + offset * element_size;
  }
};

// T is the type that is computed in: float, or double where an input is double.
template <class T>
struct RowsParams {
  Divergence divergence;
  DivergenceParameter<T> parameter;
  int64_t N, V;
  RowsTensor student, teacher;  // [N, V]
  RowsTensor grad;              // [N, V], the student's dtype; the student itself when in place
  const T* temperature;         // [N], or null: temperature_all
  const T* teacher_temperature;
  double temperature_all, teacher_temperature_all;
  bool t_squared;
  const bool* mask;         // [N], or null: every row counts
  const T* weight;          // [N], or null: 1
  const T* upstream;        // [N], or null: 1
  int64_t upstream_stride;  // 0: one upstream for all rows
  double grad_scale;        // 1 / divisor of the reduction
  const double* scale;      // the same in memory, where the host does not know it; or null
  T* loss;                  // [N]
  RowsStats* stats;         // [N], or null
  bool stream;              // write the gradient past the caches
  bool prefetch;            // this row and the next fit the second-level cache
};

}  // namespace fastkd
