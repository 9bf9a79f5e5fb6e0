// Scalar building blocks: branch-free, so that a loop over them vectorises on the CPU, and
// free of any library call, so that the same lines compile for a GPU.
#pragma once
#include <cstdint>
#include <limits>

#include "common/inline.h"

namespace fastkd::FASTKD_ISA {

template <class To, class From>
FASTKD_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(To));
  return y;
}

template <class T>
inline constexpr T kInf = std::numeric_limits<T>::infinity();
// The least normal number. A constant, as kInf is: of std's function the linker might keep another instruction set's.
template <class T>
inline constexpr T kLeast = std::numeric_limits<T>::min();
template <class T>
inline constexpr T kLog2e = T(1.4426950408889634073599246810019);

// 2^(x k) for x <= 0, k > 0 (and NaN): 0 below 2^-127. The minimax polynomial on [-1/2, 1/2] is
// off by 2e-9. With fused multiply-add x k is never rounded and the result is right to an ulp;
// without, it is off by |x k| / 3 ulp more.
FASTKD_HD float exp2_scaled(float x, float k, float lowest) {
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = lowest > x ? lowest : x;       // in this order a NaN stays
  const float shifted = x * k + kRound;
  const float r = x * k - (shifted - kRound);
  float p = 1.53458122e-4f;
  p = p * r + 1.33999312e-3f;
  p = p * r + 9.61848896e-3f;
  p = p * r + 5.55032878e-2f;
  p = p * r + 2.40226469e-1f;
  p = p * r + 6.93147206e-1f;
  p = p * r + 1.0f;
  return p * bits_as<float>((bits_as<uint32_t>(shifted) << 23) + 0x3f800000u);
}
// Taylor's series in r ln 2 up to the 13th power (|r ln 2| < 0.35: what is left out is below 5e-18).
FASTKD_HD double exp2_scaled(double x, double k, double lowest) {
  const double kRound = 6755399441055744.0;  // 1.5 * 2^52
  x = lowest > x ? lowest : x;
  const double shifted = x * k + kRound;
  const double r = (x * k - (shifted - kRound)) * 0.69314718055994530942;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * bits_as<double>((bits_as<uint64_t>(shifted) << 52) + 0x3ff0000000000000u);
}
// The x below which 2^(x k) is 0: there the exponent field of the scale becomes 0.
FASTKD_HD float exp2_lowest(float k) { return -127.0f / k; }
FASTKD_HD double exp2_lowest(double k) { return -1023.0 / k; }

// (e^w - 1 - w) / w^2 for |w| < 0.3, where e^w - 1 - w itself would cancel.
// Truncation relative to 1/2: 4e-8 (float), 3e-17 (double).
FASTKD_HD float bregman_series(float w) {
  float p = 1.0f / 5040.0f;
  p = p * w + 1.0f / 720.0f;
  p = p * w + 1.0f / 120.0f;
  p = p * w + 1.0f / 24.0f;
  p = p * w + 1.0f / 6.0f;
  return p * w + 0.5f;
}
FASTKD_HD double bregman_series(double w) {
  double p = 1.0 / 87178291200.0;
  p = p * w + 1.0 / 6227020800.0;
  p = p * w + 1.0 / 479001600.0;
  p = p * w + 1.0 / 39916800.0;
  p = p * w + 1.0 / 3628800.0;
  p = p * w + 1.0 / 362880.0;
  p = p * w + 1.0 / 40320.0;
  p = p * w + 1.0 / 5040.0;
  p = p * w + 1.0 / 720.0;
  p = p * w + 1.0 / 120.0;
  p = p * w + 1.0 / 24.0;
  p = p * w + 1.0 / 6.0;
  return p * w + 0.5;
}

// The same for |w| < 0.7. Truncation relative to 0.4: 4e-8 (float), 2e-17 (double).
FASTKD_HD float bregman_series_to_0_7(float w) {
  const float w2 = w * w;
  return bregman_series(w) + w2 * w2 * w2 * (1.0f / 40320.0f + w * (1.0f / 362880.0f));
}
FASTKD_HD double bregman_series_to_0_7(double w) {
  double p = 1.0 / 355687428096000.0;
  p = p * w + 1.0 / 20922789888000.0;
  p = p * w + 1.0 / 1307674368000.0;
  const double w2 = w * w, w4 = w2 * w2;
  return bregman_series(w) + w4 * w4 * w4 * w * p;
}

// e^w - 1 for |w| < 0.3.
template <class T>
FASTKD_HD T expm1_series(T w) {
  return w + w * w * bregman_series(w);
}

// (atanh(x) / x - 1) / x^2 as a function of x^2, for |x| <= 0.2. Truncation of atanh: 9e-9 (float), 7e-19 (double).
FASTKD_HD float atanh_tail(float x2) {
  float p = 1.0f / 9.0f;
  p = p * x2 + 1.0f / 7.0f;
  p = p * x2 + 1.0f / 5.0f;
  return p * x2 + 1.0f / 3.0f;
}
FASTKD_HD double atanh_tail(double x2) {
  double p = 1.0 / 23.0;
  p = p * x2 + 1.0 / 21.0;
  p = p * x2 + 1.0 / 19.0;
  p = p * x2 + 1.0 / 17.0;
  p = p * x2 + 1.0 / 15.0;
  p = p * x2 + 1.0 / 13.0;
  p = p * x2 + 1.0 / 11.0;
  p = p * x2 + 1.0 / 9.0;
  p = p * x2 + 1.0 / 7.0;
  p = p * x2 + 1.0 / 5.0;
  return p * x2 + 1.0 / 3.0;
}

// The same for |x| <= 1 / 3.
FASTKD_HD float atanh_tail_to_third(float x2) {
  return atanh_tail(x2) + x2 * x2 * (x2 * x2) * (1.0f / 11.0f + x2 * (1.0f / 13.0f));
}
FASTKD_HD double atanh_tail_to_third(double x2) {
  double p = 1.0 / 35.0;
  p = p * x2 + 1.0 / 33.0;
  p = p * x2 + 1.0 / 31.0;
  p = p * x2 + 1.0 / 29.0;
  p = p * x2 + 1.0 / 27.0;
  p = p * x2 + 1.0 / 25.0;
  const double x4 = x2 * x2, x8 = x4 * x4;  // x2^2, x2^4
  return atanh_tail(x2) + x8 * x8 * (x4 * x2) * p;
}

// log(sum / a) = exponent log 2 + 2 atanh(r), atanh(r) = r (1 + r^2 tail)
template <class T>
struct LogRatio {
  T log, r, tail;
};

// The exponent k that brings sum to between 2 / 3 and 3 / 2 of a 2^k: the difference of the bit patterns is log2 to
// within 0.09, rounded.
FASTKD_HD int32_t ratio_exponent(float sum, float a) {
  return (int32_t(bits_as<uint32_t>(sum) - bits_as<uint32_t>(a)) + 0x00400000) >> 23;
}
FASTKD_HD int32_t ratio_exponent(double sum, double a) {
  return int32_t((int64_t(bits_as<uint64_t>(sum) - bits_as<uint64_t>(a)) + 0x0008000000000000) >> 52);
}
FASTKD_HD float power_of_2(float, int32_t k) { return bits_as<float>(uint32_t(k + 127) << 23); }
FASTKD_HD double power_of_2(double, int32_t k) { return bits_as<double>(uint64_t(k + 1023) << 52); }

// log(sum / a) for sum = a + x > 0, right to a few ulp of itself however small x is and however small the sum, each of
// which is given as exactly as it is known. With sum = 2^k f a: k log 2 + 2 atanh((f - 1) / (f + 1)), one division.
// near: sum is between 2 / 3 and 3 / 2 of a, and k = 0. Of 0 and 0: 0.
template <class T>
FASTKD_HD LogRatio<T> log_ratio(T sum, T a, T x, bool near = false) {
  const int32_t k = near ? 0 : ratio_exponent(sum, a);
  const T base = a * power_of_2(a, k);
  const T above = k == 0 ? x : sum - base;  // x itself, not what is left of it in the sum
  const T r = above / (sum + (base + kLeast<T>)), tail = atanh_tail(r * r);
  return {T(k) * T(0.69314718055994530942) + 2 * (r + r * (r * r) * tail), r, tail};
}

}  // namespace fastkd::FASTKD_ISA
