// Few samples: what is done to the matrices of their inner products, compiled for one instruction set.
#pragma once
#include <cstdint>

namespace fastkd {

// How rows come to length 1: x / max(|x|, eps) as F.normalize does, or x / (|x| + eps) as published for PKT.
enum class Length { kAtLeast, kMore };

// A row's length, as its gradient asks for it: dL/dx = inverse (g - ratio <g, u> u) of g = dL/du.
struct UnitRow {
  double inverse;  // of what x was divided by; 0 of a row of zeros
  double ratio;    // of that to |x|; 0 where the length is not the row's own
};

template <class T>
struct SamplesKernel {
  // u = x of length 1
  UnitRow (*unit)(const T* x, int64_t D, double eps, Length length, T* u);
  // g = dL/du becomes dL/dx
  void (*unit_backward)(T* g, const T* u, int64_t D, UnitRow row);
  // Row i of G and H of similarity_preserving: returns |G_i / |G_i| - H_i / |H_i||^2. Where there is a weight for it,
  // weight times its gradient is written over G_i.
  double (*similarity)(T* G, const T* H, int64_t N, double weight);
  // Row i of G and H of gram_mse: returns sum_j v_ij (G - H)_ij^2; by times v_ij (G - H)_ij is written over G_i.
  // v_ij = half_i + half[j], or 1 where half is null. clamp: negative similarities of none, the teacher, both.
  double (*gram)(T* G, const T* H, int64_t N, int clamp, T half_i, const T* half, T by);
  // G_ij -= q_i + q[j]
  void (*subtract)(T* G, int64_t N, T q_i, const T* q);
  // Rows begin .. end of G + G^T, above the diagonal and its mirror image.
  void (*symmetrize)(T* G, int64_t N, int64_t begin, int64_t end);
  double (*sum)(const T* x, int64_t N);
  // x [N, D], its rows stride apart, less the mean of the rows that count; mean: [D].
  void (*center)(const T* x, int64_t N, int64_t D, int64_t stride, const bool* mask, T* centered, T* mean);
  // g += by x
  void (*add)(T* g, const T* x, int64_t D, T by);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const SamplesKernel<T>& samples_kernel();
}
namespace avx2 {
template <class T>
const SamplesKernel<T>& samples_kernel();
}
namespace avx512 {
template <class T>
const SamplesKernel<T>& samples_kernel();
}

}  // namespace fastkd
