// The features schedule compiled for one instruction set, as the binding sees it.
#pragma once
#include "common/features_params.h"

namespace fastkd {

// What is the same for all layers of a call.
template <class T>
struct FeaturesCall {
  const T* upstream;        // [rows of all layers], or null: 1
  int64_t upstream_stride;  // 0: one upstream for all rows
  T* row_loss;              // [rows of all layers], or null
  bool stream;              // write the gradient past the caches
  SmoothL1<T> smooth_l1;
};

template <class T>
struct FeaturesKernel {
  // Rows begin .. end of a layer; returns the sum of their losses. scale: of the gradient.
  double (*rows)(const FeaturesLayer&, const FeaturesCall<T>&, double scale, int64_t begin, int64_t end, void* scratch);
  // Rows to be given to it at once, and bytes of scratch memory that it needs for them.
  int64_t (*block_rows)(const FeaturesLayer&);
  int64_t (*scratch)(const FeaturesLayer&);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const FeaturesKernel<T>& features_kernel(Feature, bool smooth_l1);
}
namespace avx2 {
template <class T>
const FeaturesKernel<T>& features_kernel(Feature, bool smooth_l1);
}
namespace avx512 {
template <class T>
const FeaturesKernel<T>& features_kernel(Feature, bool smooth_l1);
}

}  // namespace fastkd
