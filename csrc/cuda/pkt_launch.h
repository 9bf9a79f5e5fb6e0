// The kernels of a strip of cosines, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastkd::cuda {

inline constexpr int kPktColumns = 128;  // of a warp

// The rows row .. row + rows of all pairs, from the diagonal on: column j is sample row + j. What is said of samples
// begins at sample `row`: [columns].
template <class T>
struct PktParams {
  T* student;        // [rows, columns]: cosines, which become weights of the gradient's sum over unit vectors
  const T* teacher;  // [rows, columns]
  int64_t rows, columns;
  const T *valid, *student_inverse, *teacher_inverse, *weight, *scale;
  T eps;
  double* slopes;  // +=
  double* loss;    // [], out
  // set by pkt_plan(): rows of a tile, tiles along both, and what is added up in their order
  int64_t tile_rows, row_tiles, column_tiles;
  double* row_slopes;     // [rows, column_tiles]
  double* column_slopes;  // [row_tiles, columns]
  double* losses;         // [row_tiles * column_tiles]
};

// The doubles of workspace that it wants; where it is there, where they lie.
template <class T>
int64_t pkt_plan(PktParams<T>& P, double* workspace) {
  P.tile_rows = P.rows * P.columns < int64_t(1) << 19 ? 8 : 32;  // of few pairs many short tiles
  P.row_tiles = (P.rows + P.tile_rows - 1) / P.tile_rows;
  P.column_tiles = (P.columns + kPktColumns - 1) / kPktColumns;
  P.row_slopes = workspace;
  P.column_slopes = workspace + P.rows * P.column_tiles;
  P.losses = P.column_slopes + P.row_tiles * P.columns;
  return P.rows * P.column_tiles + P.row_tiles * P.columns + P.row_tiles * P.column_tiles;
}

template <class T>
cudaError_t pkt_strip(const PktParams<T>&, cudaStream_t);

}  // namespace fastkd::cuda
