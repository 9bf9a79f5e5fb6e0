// Strips of the relational triplet loss, compiled for one instruction set, as the op sees them.
#pragma once
#include <cstdint>
#include <vector>

namespace fastkd {

// Rows row .. row + rows to all N. What is said of samples is [N].
template <class T>
struct TripletStrip {
  T* strip;  // [rows, N]: inner products of centred rows; become weights w_ij of the gradient sum_j w_ij (x_i - x_j)
  int64_t rows, row, N, D;
  const T* x;      // [N, D], as they were given: for near pairs
  const T* norms;  // squared, of the centred rows
  // of sample i: positives[first[i] .. last[i]]; itself, or one that is not valid, is none
  const int64_t *positives, *first, *last;
  const bool* valid;
  int64_t count;    // of those that are valid
  const T* weight;  // of each sample's own sum
  T margin;
  bool save;  // whether weights are wanted
};

// Of one row's triplets; the loss is weighted, and over the number of negatives.
struct TripletSums {
  double loss = 0, active = 0, triplets = 0;
};

// A pair whose difference would cancel in a product with the strip, where it is 0 now.
template <class T>
struct NearPair {
  int64_t i, j;
  T weight;
};

template <class T>
struct TripletKernel {
  void (*row)(const TripletStrip<T>&, int64_t i, TripletSums&, std::vector<NearPair<T>>&);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const TripletKernel<T>& triplet_kernel();
}
namespace avx2 {
template <class T>
const TripletKernel<T>& triplet_kernel();
}
namespace avx512 {
template <class T>
const TripletKernel<T>& triplet_kernel();
}

}  // namespace fastkd
