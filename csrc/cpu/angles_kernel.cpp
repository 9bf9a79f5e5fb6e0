// The angles of all triples of rows, of student and teacher, on one thread. Compiled once per
// instruction set.
//
//   psi_aik = q_ai q_ak (h_ai + h_ak - h_ik)    h = |x - y|^2 / 2, q = 1 / |x - y|
//   e = psi_student - psi_teacher, r = clamp(e, -delta, delta), loss = sum Huber(e)
//   alpha_ai = sum_k r q_ak, beta_ai = sum_k r psi, K_ik = sum_a r q_ai q_ak
//
// With A the sum in brackets e is (A_s - A_t) q_t q_t + A_s (q_s q_s - q_t q_t), from differences of the
// sides that are rounded once: near convergence psi_student - psi_teacher itself has no digit left.
//
// psi is symmetric in i and k: every pair (i, k) is visited once and counted for both. For 16 triples
// 21 instructions on vectors of 16; of memory two tiles, K, and the vertex's arrays for four rows i at
// once. kStep rows of the tiles stay in L1 for all vertices.
#include "cpu/angles_kernel.h"

#include <cmath>

#include "math/distance.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kStep = 16;  // rows and columns are padded to it

void norms(const double* x, int64_t n, int64_t D, double* out) {
  for (int64_t i = 0; i < n; ++i) {
    const double* row = x + i * D;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += row[d] * row[d];
    out[i] = sum;
  }
}

double squared_distance(const double* x, const double* y, int64_t D) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += (x[d] - y[d]) * (x[d] - y[d]);
  return sum;
}

void distances(const AnglesGram& g) {
  const double* norms_k = g.norms_k;
  for (int64_t i = 0; i < g.rows; ++i) {
    double* d = g.tile + i * g.columns;
    const double norm = g.norms_i[i];
    int64_t near = 0;
#pragma omp simd reduction(+ : near)
    for (int64_t k = 0; k < g.columns; ++k) {
      const double both = norm + norms_k[k], squared = both - 2 * d[k];
      near += squared < kNear<double> * both;
      d[k] = squared;
    }
    if (g.diagonal) d[i] = d[i] == d[i] ? 0 : d[i];
    if (near <= g.diagonal) continue;
    for (int64_t k = 0; k < g.columns; ++k) {
      if (d[k] < kNear<double> * (norm + norms_k[k])) d[k] = squared_distance(g.x_i + i * g.D, g.x_k + k * g.D, g.D);
    }
  }
}

template <class T>
void halves_of_row(const double* s, const double* t, int64_t n, const AnglesSides& sides, T* half, T* difference) {
  const double student_scale = sides.student_scale / 2, teacher_scale = sides.teacher_scale / 2;
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    half[k] = T(s[k] * student_scale);
    difference[k] = T(s[k] * student_scale - t[k] * teacher_scale);
  }
}

template <class T>
void halves(const AnglesSides& sides, T* half, T* difference, int64_t stride) {
  for (int64_t i = 0; i < sides.rows; ++i) {
    const int64_t at = i * sides.columns;
    halves_of_row(sides.student + at, sides.teacher + at, sides.columns, sides, half + i * stride,
                  difference + i * stride);
  }
}

template <class T>
AnglesRange fill(const AnglesSides& sides, const AnglesStrip<T>& strip, int64_t vertex, int64_t column) {
  double least_s = INFINITY, largest_s = 0, least_t = INFINITY, largest_t = 0, ratio = 0;
  for (int64_t i = 0; i < sides.rows; ++i) {
    const double *s = sides.student + i * sides.columns, *t = sides.teacher + i * sides.columns;
    T *q = strip.row(vertex + i, kStudentInverse) + column, *p = strip.row(vertex + i, kTeacherInverse) + column,
      *difference = strip.row(vertex + i, kInverseDifference) + column;
    halves_of_row(s, t, sides.columns, sides, strip.row(vertex + i, kHalf) + column,
                  strip.row(vertex + i, kHalfDifference) + column);
#pragma omp simd
    for (int64_t k = 0; k < sides.columns; ++k) {
      const double inverse_s = 1 / std::sqrt(s[k] * sides.student_scale);
      const double inverse_t = 1 / std::sqrt(t[k] * sides.teacher_scale);
      const double q_s = s[k] < kMinSquaredLength ? 0 : inverse_s, q_t = t[k] < kMinSquaredLength ? 0 : inverse_t;
      q[k] = T(q_s);
      p[k] = T(q_t);
      difference[k] = T(q_s - q_t);
    }
#pragma omp simd reduction(min : least_s, least_t) reduction(max : largest_s, largest_t, ratio)
    for (int64_t k = 0; k < sides.columns; ++k) {
      const double from_s = s[k] < kMinSquaredLength ? double(INFINITY) : s[k],
                   from_t = t[k] < kMinSquaredLength ? double(INFINITY) : t[k];
      const double ratio_k = s[k] / from_t;
      least_s = from_s < least_s ? from_s : least_s;
      least_t = from_t < least_t ? from_t : least_t;
      largest_s = s[k] > largest_s ? s[k] : largest_s;
      largest_t = t[k] > largest_t ? t[k] : largest_t;
      ratio = ratio_k > ratio ? ratio_k : ratio;
    }
  }
  return {least_s, largest_s, least_t, largest_t, ratio * sides.student_scale / sides.teacher_scale};
}

// Of a pair of rows, as the arrays of a strip say it.
template <class T>
struct Edge {
  T q, teacher_q, q_difference, h, h_difference;
};

// One triple; what is its i's goes to alpha_i and beta_i, where kBoth, what is its k's to alpha_k and beta_k.
template <bool kGrad, bool kBoth, class T>
FASTKD_HD void triple(const Edge<T>& ai, const Edge<T>& ak, T h_ik, T h_difference_ik, T delta, T& loss, T& alpha_i,
                      T& beta_i, T& alpha_k, T& beta_k, T& kappa) {
  // a difference of like numbers first: it is exact, or nearly so
  const T h = ai.h + (ak.h - h_ik), h_difference = ai.h_difference + (ak.h_difference - h_difference_ik);
  const T both = ai.q * ak.q, psi = h * both;
  const T e =
      h_difference * (ai.teacher_q * ak.teacher_q) + h * (ai.q_difference * ak.q + ai.teacher_q * ak.q_difference);
  const T below = e > delta ? delta : e, r = below < -delta ? -delta : below;  // in this order a NaN stays
  loss += r * (e - r * T(0.5));
  if constexpr (kGrad) {
    alpha_k += r * ai.q;
    beta_k += r * psi;
    kappa += r * both;
    if constexpr (kBoth) {
      alpha_i += r * ak.q;
      beta_i += r * psi;
    }
  }
}

template <class T>
FASTKD_HD Edge<T> edge(const T* arrays, int64_t stride) {
  return {arrays[kStudentInverse * stride], arrays[kTeacherInverse * stride], arrays[kInverseDifference * stride],
          arrays[kHalf * stride], arrays[kHalfDifference * stride]};
}

// Vertex `a`, rows i .. i + 3 of the tile, columns begin .. end.
template <bool kGrad, bool kBoth, class T>
T four_rows(const AnglesStrip<T>& strip, const AnglesTile<T>& tile, int64_t a, int64_t i, int64_t begin, int64_t end) {
  const T delta = tile.delta;
  const int64_t stride = tile.stride, array = strip.stride, kappa_stride = kGrad ? tile.kappa_stride : 0;
  const T *of_i = strip.row(a, 0) + tile.row + i, *of_k = strip.row(a, 0) + tile.column;
  const Edge<T> i0 = edge(of_i, array), i1 = edge(of_i + 1, array), i2 = edge(of_i + 2, array),
                i3 = edge(of_i + 3, array);
  const T *h0 = tile.half + i * stride, *h1 = h0 + stride, *h2 = h1 + stride, *h3 = h2 + stride;
  const T *g0 = tile.half_difference + i * stride, *g1 = g0 + stride, *g2 = g1 + stride, *g3 = g2 + stride;
  T *k0 = tile.kappa + i * kappa_stride, *k1 = k0 + kappa_stride, *k2 = k1 + kappa_stride, *k3 = k2 + kappa_stride;
  T *alpha = strip.row(a, kAlpha) + tile.column, *beta = strip.row(a, kBeta) + tile.column;
  T loss = 0, a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : loss, a0, a1, a2, a3, b0, b1, b2, b3)
  for (int64_t k = begin; k < end; ++k) {
    const Edge<T> ak = edge(of_k + k, array);
    T alpha_k = 0, beta_k = 0, x0 = 0, x1 = 0, x2 = 0, x3 = 0;
    if constexpr (kGrad) {
      alpha_k = alpha[k], beta_k = beta[k];
      x0 = k0[k], x1 = k1[k], x2 = k2[k], x3 = k3[k];
    }
    triple<kGrad, kBoth>(i0, ak, h0[k], g0[k], delta, loss, a0, b0, alpha_k, beta_k, x0);
    triple<kGrad, kBoth>(i1, ak, h1[k], g1[k], delta, loss, a1, b1, alpha_k, beta_k, x1);
    triple<kGrad, kBoth>(i2, ak, h2[k], g2[k], delta, loss, a2, b2, alpha_k, beta_k, x2);
    triple<kGrad, kBoth>(i3, ak, h3[k], g3[k], delta, loss, a3, b3, alpha_k, beta_k, x3);
    if constexpr (kGrad) {
      alpha[k] = alpha_k, beta[k] = beta_k;
      k0[k] = x0, k1[k] = x1, k2[k] = x2, k3[k] = x3;
    }
  }
  if constexpr (kGrad && kBoth) {
    T *alpha_i = strip.row(a, kAlpha) + tile.row + i, *beta_i = strip.row(a, kBeta) + tile.row + i;
    alpha_i[0] += a0, alpha_i[1] += a1, alpha_i[2] += a2, alpha_i[3] += a3;
    beta_i[0] += b0, beta_i[1] += b1, beta_i[2] += b2, beta_i[3] += b3;
  }
  return loss;
}

// Of a block's tile with itself the part above the diagonal; around it pairs are visited in both orders,
// and counted for k alone.
template <bool kGrad, class T>
double sweep_of(const AnglesStrip<T>& strip, const AnglesTile<T>& tile, int64_t begin, int64_t end) {
  double once = 0, twice = 0;
  const bool diagonal = tile.row == tile.column;
  for (int64_t first = 0; first < tile.rows; first += kStep) {
    const int64_t after = diagonal ? first + kStep : 0;
    for (int64_t a = begin; a < end; ++a) {
      for (int64_t i = first; i < first + kStep; i += 4) {
        if (diagonal) once += double(four_rows<kGrad, false>(strip, tile, a, i, first, after));
        if (after < tile.columns) twice += double(four_rows<kGrad, true>(strip, tile, a, i, after, tile.columns));
      }
    }
    if (!kGrad || !diagonal) continue;
    for (int64_t i = first; i < after; ++i) {
      for (int64_t k = first; k < after; ++k) tile.kappa[i * tile.kappa_stride + k] /= 2;
    }
  }
  return once + 2 * twice;
}

template <class T>
double sweep(const AnglesStrip<T>& strip, const AnglesTile<T>& tile, int64_t begin, int64_t end) {
  return tile.kappa ? sweep_of<true>(strip, tile, begin, end) : sweep_of<false>(strip, tile, begin, end);
}

template <class T>
void weights(const AnglesStrip<T>& strip, int64_t begin, int64_t end, double* sums) {
  for (int64_t a = 0; a < strip.vertices; ++a) {
    const T *q = strip.row(a, kStudentInverse), *beta = strip.row(a, kBeta), *kappa = strip.row(a, kKappa);
    T* alpha = strip.row(a, kAlpha);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      alpha[i] = q[i] * (alpha[i] - q[i] * beta[i]) - kappa[i];
      sums[i] += double(alpha[i]);
    }
  }
}

template <class T>
double sum(const T* x, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(x[i]);
  return total;
}

template <class T>
const AnglesKernel<T> kernel = {norms, distances, fill<T>, halves<T>, sweep<T>, weights<T>, sum<T>};

}  // namespace

template <class T>
const AnglesKernel<T>& angles_kernel() {
  return kernel<T>;
}
template const AnglesKernel<float>& angles_kernel<float>();
template const AnglesKernel<double>& angles_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
