// The kernels of the angles schedule, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/embeddings_params.h"
#include "cuda/rows_launch.h"

namespace fastkd::cuda {

// T is the type that is computed in: float, or double where an input is double.
template <class T>
struct AnglesParams {
  Embeddings student, teacher;  // [N, D_s], [N, D_t]
  int64_t N;
  const int64_t* count;  // []: rows from there on are not; or null: all N are
  double delta, weight;
  int block;  // rows that are taken together, a multiple of kAnglesTile; fewer where N is
  T* loss;    // []
  T* grad;    // [N, D_s], or null
};

inline constexpr int kAnglesTile = 64;
// Bounds the workspace: about 13 matrices [block, block] where it holds all rows, else 25.
template <class T>
inline constexpr int kAnglesBlock = sizeof(T) == 4 ? 1024 : 512;

template <class T>
int64_t angles_workspace_bytes(const AnglesParams<T>&, const Device&);
// loss = weight * rkd_angle, grad its gradient. N > 0; workspace: 16-byte aligned.
template <class T>
cudaError_t angles_forward(const AnglesParams<T>&, const Device&, void* workspace, cudaStream_t);

}  // namespace fastkd::cuda
