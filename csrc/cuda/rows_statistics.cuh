// The first pass of the rows schedule as a kernel of its own, several blocks a row; see rows_kernel.cuh. It is the same
// for all divergences, and compiled once.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/rows_kernel.cuh"

namespace fastkd::cuda {

// What a pass leaves for the next.
template <class T>
struct RowsParts {
  Sums<T>* sums;        // [N, splits]
  LossSums<T>* losses;  // [N, splits]
  HardSums<T>* hard;    // [N, splits]
  int splits;           // of a row, at most 32: one a lane
};

// In memory for rows * splits * kPartValues of T.
template <class T>
RowsParts<T> parts_in(void* workspace, int64_t N, int splits) {
  RowsParts<T> parts;
  parts.splits = splits;
  parts.sums = static_cast<Sums<T>*>(workspace);
  parts.losses = reinterpret_cast<LossSums<T>*>(parts.sums + N * splits);
  parts.hard = reinterpret_cast<HardSums<T>*>(parts.losses + N * splits);
  return parts;
}

// The packs of a row that one of its blocks takes, and the first edge of a thread and its step: a row that is not read
// in packs is all edges.
template <class T>
struct Slice {
  int64_t begin = 0, end = 0, edge, edge_step;
  template <class S, class U>
  __device__ Slice(const RowLayout<S, U>& L, int split, int splits)
      : edge(int64_t(split) * blockDim.x + threadIdx.x), edge_step(int64_t(splits) * blockDim.x) {
    if constexpr (kInPacks<T>) {
      const int64_t each = (L.packs + splits - 1) / splits;
      begin = split * each < L.packs ? split * each : L.packs;
      end = begin + each < L.packs ? begin + each : L.packs;
    }
  }
};

// The pass over the rows from first_row on, in a grid (splits * rows). entropy: whether the teacher's is wanted;
// parted: whether the target is left out.
template <class T>
cudaError_t rows_statistics(const RowsParams<T>&, const RowsParts<T>&, int64_t first_row, const Launch&, bool entropy,
                            bool parted);

}  // namespace fastkd::cuda
