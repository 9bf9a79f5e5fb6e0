// The kernels of a strip of triplets, as the binding sees them: no torch header, no kernel.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/inline.h"

namespace fastkd::cuda {

// Positives whose thresholds are sorted at a time, and one that is above all.
inline constexpr int kTripletMostRoom = 1024;
inline constexpr int64_t kTripletMost = int64_t(1)
                                        << 30;  // samples, and features, so that steps beyond them fit an int

// Rows row .. row + rows to all N. What is said of samples is [N].
template <class T>
struct TripletParams {
  T* strip;  // [rows, N]: inner products of centred rows; become weights w_ij of the gradient sum_j w_ij (x_i - x_j)
  int32_t rows, row, N, D;
  const T* x;      // [N, D], as they were given: for near pairs
  const T* norms;  // squared, of the centred rows
  // of sample i: positives[first[i] .. last[i]]; itself, or one that is not valid, is none
  const int64_t *positives, *first, *last;
  int64_t length;  // of positives
  const bool* valid;
  const int64_t* count;  // [], of those that are valid
  const T* weight;       // of each sample's own sum
  T margin;
  T* grad;       // [N, D], += of near pairs; or null: no weights are wanted
  double* sums;  // [3], out: of the loss, the active triplets and all
  // set by triplet_plan()
  int32_t room;       // thresholds that are sorted at a time: a power of 2
  double* row_sums;   // [3, rows]
  uint32_t* near;     // [ceil(N / 32), rows], bit j % 32: the pair is near; where there is a gradient
  int32_t* triplets;  // [rows, N]: so far, of a pair; where a row may have more positives than there is room for

  FASTKD_HD int64_t row_at(int i) const { return int64_t(i) * N; }
  FASTKD_HD int64_t sample_at(int j) const { return int64_t(j) * D; }
  FASTKD_HD uint32_t* near_at(int j) const { return near + int64_t(j / 32) * rows; }  // [rows]
};

// The bytes of workspace that it wants; where it is there, where they lie.
template <class T>
int64_t triplet_plan(TripletParams<T>& P, char* workspace) {
  const int64_t most = P.length < P.N ? P.length : P.N;
  P.room = 2;
  while (P.room <= most && P.room < kTripletMostRoom) P.room *= 2;
  int64_t bytes = 0;
  const auto take = [&](int64_t wanted) {
    char* at = workspace + bytes;
    bytes += (wanted + 15) / 16 * 16;
    return wanted > 0 ? at : nullptr;
  };
  P.row_sums = reinterpret_cast<double*>(take(int64_t(sizeof(double)) * 3 * P.rows));
  P.near = reinterpret_cast<uint32_t*>(take(P.grad ? int64_t(sizeof(uint32_t)) * ((P.N + 31) / 32) * P.rows : 0));
  P.triplets = reinterpret_cast<int32_t*>(take(P.grad && most >= P.room ? int64_t(sizeof(int32_t)) * P.rows * P.N : 0));
  return bytes;
}

template <class T>
cudaError_t triplet_strip(const TripletParams<T>&, cudaStream_t);

}  // namespace fastkd::cuda
