// The angles of all triples of rows, of student and teacher, on one thread. Compiled once per
// instruction set.
//
//   psi_aik = q_ai q_ak (h_ai + h_ak - h_ik)    h = |x - y|^2 / 2, q = 1 / |x - y|
//   r = clamp(psi_student - psi_teacher, -delta, delta), loss = sum Huber
//   alpha_ai = sum_k r q_ak, beta_ai = sum_k r psi, K_ik = sum_a r q_ai q_ak
//
// psi is symmetric in i and k: every pair (i, k) is visited once and counted for both. For 16 triples
// 17 instructions on vectors of 16, and of memory two tiles, K, and the vertex's arrays for four rows i
// at once: strips of kStep rows of the tiles stay in L1 for all vertices.
#include "cpu/triples_kernel.h"

#include <cmath>

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kStep = 16;  // rows and columns are padded to it

// Below this share of |x|^2 + |y|^2 a squared distance from the Gram has lost too many digits.
constexpr double kNear = 1.0 / 1024;
constexpr double kLeast = 1e-24;  // of a squared distance; below it two rows are the same, as published

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

TriplesSpread distances(const TriplesGram& g) {
  double least = INFINITY, largest = 0;
  const double* norms_k = g.norms_k;
  for (int64_t i = 0; i < g.rows; ++i) {
    double* d = g.tile + i * g.columns;
    const double norm = g.norms_i[i];
    int64_t near = 0;
#pragma omp simd reduction(+ : near)
    for (int64_t k = 0; k < g.columns; ++k) {
      const double both = norm + norms_k[k], squared = both - 2 * d[k];
      near += squared < kNear * both;
      d[k] = squared;
    }
    if (g.diagonal) d[i] = d[i] == d[i] ? 0 : d[i];
    if (near > g.diagonal) {
      for (int64_t k = 0; k < g.columns; ++k) {
        if (d[k] < kNear * (norm + norms_k[k])) d[k] = squared_distance(g.x_i + i * g.D, g.x_k + k * g.D, g.D);
      }
    }
#pragma omp simd reduction(min : least) reduction(max : largest)
    for (int64_t k = 0; k < g.columns; ++k) {
      const double size = d[k] < kLeast ? double(INFINITY) : d[k];
      least = size < least ? size : least;
      largest = d[k] > largest ? d[k] : largest;
    }
  }
  return {least, largest};
}

template <class T>
void halves(const TriplesGram& g, T* half, T* inverse, int64_t stride) {
  for (int64_t i = 0; i < g.rows; ++i) {
    const double* d = g.tile + i * g.columns;
    T* h = half + i * stride;
#pragma omp simd
    for (int64_t k = 0; k < g.columns; ++k) h[k] = T(d[k] / 2);
    if (!inverse) continue;
    T* q = inverse + i * stride;
#pragma omp simd
    for (int64_t k = 0; k < g.columns; ++k) {
      const double inverse_k = 1 / std::sqrt(d[k]);
      q[k] = d[k] < kLeast ? T(0) : T(inverse_k);
    }
  }
}

// One triple; what is its i's goes to alpha_i and beta_i, where kBoth, what is its k's to alpha_k and beta_k.
template <bool kGrad, bool kBoth, class T>
FASTKD_HD void triple(T q_ai, T h_ai, T teacher_q_ai, T teacher_h_ai, T q_ak, T h_ak, T teacher_q_ak, T teacher_h_ak,
                      T h_ik, T teacher_h_ik, T delta, T& loss, T& alpha_i, T& beta_i, T& alpha_k, T& beta_k,
                      T& kappa) {
  const T both = q_ai * q_ak, psi = (h_ai + h_ak - h_ik) * both;
  const T e = psi - (teacher_h_ai + teacher_h_ak - teacher_h_ik) * (teacher_q_ai * teacher_q_ak);
  const T below = e > delta ? delta : e, r = below < -delta ? -delta : below;  // in this order a NaN stays
  loss += r * (e - r * T(0.5));
  if constexpr (kGrad) {
    alpha_k += r * q_ai;
    beta_k += r * psi;
    kappa += r * both;
    if constexpr (kBoth) {
      alpha_i += r * q_ak;
      beta_i += r * psi;
    }
  }
}

// Vertex `a`, rows i .. i + 3 of the tile, columns begin .. end.
template <bool kGrad, bool kBoth, class T>
T four_rows(const TriplesStrip<T>& strip, const TriplesTile<T>& tile, int64_t a, int64_t i, int64_t begin,
            int64_t end) {
  const T delta = tile.delta;
  const int64_t stride = tile.stride;
  const T *q_i = strip.row(a, kStudentInverse) + tile.row + i, *q_k = strip.row(a, kStudentInverse) + tile.column;
  const T *h_i = strip.row(a, kStudentHalf) + tile.row + i, *h_k = strip.row(a, kStudentHalf) + tile.column;
  const T *p_i = strip.row(a, kTeacherInverse) + tile.row + i, *p_k = strip.row(a, kTeacherInverse) + tile.column;
  const T *g_i = strip.row(a, kTeacherHalf) + tile.row + i, *g_k = strip.row(a, kTeacherHalf) + tile.column;
  T *alpha = strip.row(a, kAlpha) + tile.column, *beta = strip.row(a, kBeta) + tile.column;
  const T *h0 = tile.student + i * stride, *h1 = h0 + stride, *h2 = h1 + stride, *h3 = h2 + stride;
  const T *g0 = tile.teacher + i * stride, *g1 = g0 + stride, *g2 = g1 + stride, *g3 = g2 + stride;
  const int64_t kappa_stride = kGrad ? stride : 0;
  T *k0 = tile.kappa + i * kappa_stride, *k1 = k0 + kappa_stride, *k2 = k1 + kappa_stride, *k3 = k2 + kappa_stride;
  const T q_0 = q_i[0], q_1 = q_i[1], q_2 = q_i[2], q_3 = q_i[3], h_0 = h_i[0], h_1 = h_i[1], h_2 = h_i[2],
          h_3 = h_i[3], p_0 = p_i[0], p_1 = p_i[1], p_2 = p_i[2], p_3 = p_i[3], g_0 = g_i[0], g_1 = g_i[1],
          g_2 = g_i[2], g_3 = g_i[3];
  T loss = 0, a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : loss, a0, a1, a2, a3, b0, b1, b2, b3)
  for (int64_t k = begin; k < end; ++k) {
    const T q = q_k[k], h = h_k[k], p = p_k[k], g = g_k[k];
    T alpha_k = 0, beta_k = 0, x0 = 0, x1 = 0, x2 = 0, x3 = 0;
    if constexpr (kGrad) {
      alpha_k = alpha[k], beta_k = beta[k];
      x0 = k0[k], x1 = k1[k], x2 = k2[k], x3 = k3[k];
    }
    triple<kGrad, kBoth>(q_0, h_0, p_0, g_0, q, h, p, g, h0[k], g0[k], delta, loss, a0, b0, alpha_k, beta_k, x0);
    triple<kGrad, kBoth>(q_1, h_1, p_1, g_1, q, h, p, g, h1[k], g1[k], delta, loss, a1, b1, alpha_k, beta_k, x1);
    triple<kGrad, kBoth>(q_2, h_2, p_2, g_2, q, h, p, g, h2[k], g2[k], delta, loss, a2, b2, alpha_k, beta_k, x2);
    triple<kGrad, kBoth>(q_3, h_3, p_3, g_3, q, h, p, g, h3[k], g3[k], delta, loss, a3, b3, alpha_k, beta_k, x3);
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

// On the diagonal of a tile of a block with itself pairs are visited in both orders, and counted for k alone.
template <bool kGrad, class T>
double sweep_of(const TriplesStrip<T>& strip, const TriplesTile<T>& tile, int64_t begin, int64_t end) {
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
  }
  return once + 2 * twice;
}

template <class T>
double sweep(const TriplesStrip<T>& strip, const TriplesTile<T>& tile, int64_t begin, int64_t end) {
  return tile.kappa ? sweep_of<true>(strip, tile, begin, end) : sweep_of<false>(strip, tile, begin, end);
}

template <class T>
void weights(const TriplesStrip<T>& strip, int64_t begin, int64_t end, double* sums) {
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
const TriplesKernel<T> kernel = {norms, distances, halves<T>, sweep<T>, weights<T>, sum<T>};

}  // namespace

template <class T>
const TriplesKernel<T>& triples_kernel() {
  return kernel<T>;
}
template const TriplesKernel<float>& triples_kernel<float>();
template const TriplesKernel<double>& triples_kernel<double>();

}  // namespace fastkd::FASTKD_ISA
