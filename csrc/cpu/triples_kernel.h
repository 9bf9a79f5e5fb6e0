// What is done to triples on one thread, compiled for one instruction set, as the schedule sees it.
#pragma once
#include <cstdint>

#include "common/inline.h"

namespace fastkd {

// What is known of vertex a and every other row i, [stride] each, one after the other.
enum TriplesArray : int64_t {
  kStudentInverse,  // q = 1 / |x_a - x_i|, 0 where they are equal
  kStudentHalf,     // h = |x_a - x_i|^2 / 2
  kTeacherInverse,
  kTeacherHalf,
  kAlpha,  // sum_k r q_ak; then the weights
  kBeta,   // sum_k r psi
  kKappa,  // K, of which W takes the sum with its transpose: the upper triangle, half of the diagonal tiles
  kTriplesArrays
};

// The vertices of a strip. Columns beyond N are 0: there r is 0.
template <class T>
struct TriplesStrip {
  T* memory;  // [vertices, kTriplesArrays, stride]
  int64_t stride;
  int64_t begin, vertices;  // the first vertex is row `begin` of the embeddings

  FASTKD_HD T* row(int64_t vertex, int64_t array) const { return memory + (vertex * kTriplesArrays + array) * stride; }
};

// Pairs (i, k) of a block of rows with the same or another one.
template <class T>
struct TriplesTile {
  const T *student, *teacher;  // [rows, stride], h_ik
  T* kappa;                    // [rows, stride], sum_a r q_ai q_ak; null: no gradient
  int64_t stride;
  int64_t row, rows;        // the first i; how many, padded
  int64_t column, columns;  // the same of k
  T delta;
};

// Inner products of a tile, which become squared distances.
struct TriplesGram {
  double* tile;  // [rows, columns]
  const double *x_i, *x_k;
  const double *norms_i, *norms_k;
  int64_t rows, columns, D;
  bool diagonal;
};

// Of the squared distances that are not 0.
struct TriplesSpread {
  double least, largest;
};

template <class T>
struct TriplesKernel {
  // squared norms of rows [n, D]
  void (*norms)(const double* x, int64_t n, int64_t D, double* norms);
  TriplesSpread (*distances)(const TriplesGram&);
  // from squared distances h and, where it is not null, q; out is [rows, stride]
  void (*halves)(const TriplesGram&, T* half, T* inverse, int64_t stride);
  // the sum of the losses of ordered triples, vertices begin .. end
  double (*sweep)(const TriplesStrip<T>&, const TriplesTile<T>&, int64_t begin, int64_t end);
  // columns begin .. end of alpha become q alpha - q^2 beta - K; sums[begin + i] += their sum
  void (*weights)(const TriplesStrip<T>&, int64_t begin, int64_t end, double* sums);
  double (*sum)(const T* x, int64_t n);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const TriplesKernel<T>& triples_kernel();
}
namespace avx2 {
template <class T>
const TriplesKernel<T>& triples_kernel();
}
namespace avx512 {
template <class T>
const TriplesKernel<T>& triples_kernel();
}

}  // namespace fastkd
