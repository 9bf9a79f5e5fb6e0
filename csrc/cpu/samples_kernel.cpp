// Few samples on the CPU: rows of the matrices of their inner products, each on one thread. Sums are in double.
// Compiled once per instruction set.
#include "cpu/samples_kernel.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {
namespace {

template <class T>
double dot(const T* x, const T* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]) * double(y[i]);
  return sum;
}

template <class T>
double sum(const T* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(x[i]);
  return sum;
}

// The squares of float are in double's range; those of double may not be.
template <class T>
double length_of(const T* x, int64_t n) {
  if constexpr (sizeof(T) == 4) return std::sqrt(dot(x, x, n));
  double largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
  if (largest == 0 || std::isinf(largest)) return std::sqrt(dot(x, x, n));  // 0, NaN or infinite
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += (x[i] / largest) * (x[i] / largest);
  return largest * std::sqrt(squares);
}

template <class T>
UnitRow unit(const T* x, int64_t D, double eps, Length how, T* u) {
  const double length = length_of(x, D);
  UnitRow row;
  if (length == 0) {
    row = {0, 0};
  } else if (how == Length::kMore) {
    row = {1 / (length + eps), (length + eps) / length};
    if (std::isinf(row.ratio)) row = {0, 0};  // so short that it is a row of zeros
  } else {
    row = length < eps ? UnitRow{1 / eps, 0} : UnitRow{1 / length, 1};
  }
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) u[d] = T(double(x[d]) * row.inverse);
  return row;
}

template <class T>
void unit_backward(T* g, const T* u, int64_t D, UnitRow row) {
  const double along = row.ratio == 0 ? 0 : row.ratio * dot(g, u, D);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) g[d] = T(row.inverse * (double(g[d]) - along * double(u[d])));
}

template <class T>
double inverse_length(const T* x, int64_t n) {
  const double squares = dot(x, x, n);
  return squares == 0 ? 0 : 1 / std::sqrt(squares);
}

// With s = G_i / |G_i| and e = s - t: the gradient is 2 (e - <e, s> s) / |G_i|.
template <class T>
double similarity(T* G, const T* H, int64_t N, double weight) {
  const double a = inverse_length(G, N), b = inverse_length(H, N);
  double loss = 0, along = 0;
#pragma omp simd reduction(+ : loss, along)
  for (int64_t j = 0; j < N; ++j) {
    const double s = double(G[j]) * a, e = s - double(H[j]) * b;
    loss += e * e;
    along += e * s;
  }
  const double by = 2 * weight * a;
#pragma omp simd
  for (int64_t j = 0; j < N; ++j) {
    const double s = double(G[j]) * a, e = s - double(H[j]) * b;
    G[j] = T(by * (e - along * s));
  }
  return loss;
}

template <class T, int kClamp, bool kWeighted>
double gram_row(T* G, const T* H, int64_t N, T half_i, const T* half, T by) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < N; ++j) {
    // in this order a NaN stays
    const T h = kClamp >= 1 && H[j] < 0 ? T(0) : H[j], g = kClamp == 2 && G[j] < 0 ? T(0) : G[j];
    const T e = g - h, v = kWeighted ? half_i + half[j] : T(1);
    squares += double(e) * double(e) * double(v);
    G[j] = kClamp == 2 && G[j] <= 0 ? T(0) : by * (v * e);
  }
  return squares;
}

template <class T>
double gram(T* G, const T* H, int64_t N, int clamp, T half_i, const T* half, T by) {
  const auto of_clamp = [&]<int kClamp>() {
    return half ? gram_row<T, kClamp, true>(G, H, N, half_i, half, by)
                : gram_row<T, kClamp, false>(G, H, N, half_i, half, by);
  };
  return clamp == 0   ? of_clamp.template operator()<0>()
         : clamp == 1 ? of_clamp.template operator()<1>()
                      : of_clamp.template operator()<2>();
}

template <class T>
void subtract(T* G, int64_t N, T q_i, const T* q) {
#pragma omp simd
  for (int64_t j = 0; j < N; ++j) G[j] -= q_i + q[j];
}

// Tile by tile: a column of a tile stays in the caches.
template <class T>
void symmetrize(T* G, int64_t N, int64_t begin, int64_t end) {
  constexpr int64_t kTile = 16;
  for (int64_t i0 = begin; i0 < end; i0 += kTile) {
    const int64_t i1 = std::min(i0 + kTile, end);
    for (int64_t j0 = i0; j0 < N; j0 += kTile) {
      const int64_t j1 = std::min(j0 + kTile, N);
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = std::max(j0, i); j < j1; ++j) {
          const T both = G[i * N + j] + G[j * N + i];
          G[i * N + j] = G[j * N + i] = both;
        }
      }
    }
  }
}

template <class T>
void center(const T* x, int64_t N, int64_t D, int64_t stride, const bool* mask, T* centered, T* mean) {
  std::vector<double> sums(D);
  double* of_rows = sums.data();
  int64_t count = 0;
  for (int64_t i = 0; i < N; ++i) {
    if (mask && !mask[i]) continue;
    ++count;
    const T* row = x + i * stride;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) of_rows[d] += double(row[d]);
  }
  for (int64_t d = 0; d < D; ++d) mean[d] = T(of_rows[d] / double(count));
  for (int64_t i = 0; i < N; ++i) {
    const T* row = x + i * stride;
    T* out = centered + i * D;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[d] = row[d] - mean[d];
  }
}

template <class T>
void add(T* g, const T* x, int64_t D, T by) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) g[d] += by * x[d];
}

template <class T>
const SamplesKernel<T> kernel = {unit<T>,       unit_backward<T>, similarity<T>, gram<T>, subtract<T>,
                                 symmetrize<T>, sum<T>,           center<T>,     add<T>};

}  // namespace

template <class T>
const SamplesKernel<T>& samples_kernel() {
  return kernel<T>;
}
template const SamplesKernel<float>& samples_kernel<float>();
template const SamplesKernel<double>& samples_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
