// The kernels of attention transfer, as the binding sees them: no torch header, no kernel.
#pragma once
#include "cuda/features_launch.h"

namespace fastkd::cuda {

// Rows of channels [B * positions, C]; of each the sum of |x|^p / C.
template <class T>
struct AttentionPowers {
  FeaturesPart<T> sides[2];  // student and teacher, each with the tensor `student` alone
  double* maps[2];           // [B * positions], out
  double p;
  int32_t room;  // doubles, the more of both
};
template <class T>
cudaError_t attention_powers(const AttentionPowers<T>&, int64_t blocks, cudaStream_t);

// From the maps of each sample its loss, and what the student's |x|^(p - 1) sign x is multiplied by.
template <class T>
struct AttentionMaps {
  int64_t positions;
  const double* student;  // [B, positions]
  double* teacher;        // [B, positions]; the factors take its place where they are wanted
  bool factors;
  double scale;       // of the gradient, and p / C
  const T* upstream;  // [], or null: 1
  double* losses;     // [B], out
};
template <class T>
cudaError_t attention_maps(const AttentionMaps<T>&, int64_t samples, cudaStream_t);

template <class T>
struct AttentionSlopes {
  FeaturesPart<T> layer;        // student and grad
  const double *map, *factors;  // [B * positions]
  double p;
};
template <class T>
cudaError_t attention_slopes(const AttentionSlopes<T>&, int64_t blocks, cudaStream_t);

}  // namespace fastkd::cuda
