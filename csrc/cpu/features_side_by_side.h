// Rows that lie next to each other on the CPU, as the positions of [B, C, H, W] do: vectors run across the rows.
// Buffers are [D][lanes], lanes the padded number of rows. See features_kernel.cpp.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/features_scales.h"
#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kMostRows = 1024;
constexpr int64_t kTileBytes = int64_t(1) << 20;  // of both sides: what a second-level cache holds
constexpr int64_t kFeaturesAtOnce = 32;           // added up in T; what they add up to in double
constexpr int64_t kBlock = 32768;                 // elements of a block of rows

template <class T>
void load_side_by_side(const RowsTensor& x, int64_t row, int64_t rows, int64_t D, T* buffer) {
  RowsTensor across = x;  // a row of it: one feature of all rows
  across.stride_v = 1;
  const char* from = x.row(row);
  const int64_t lanes = padded(rows);
  for (int64_t k = 0; k < D; ++k) {
    T* to = buffer + k * lanes;
    const T* found = load_block(across, from + k * x.stride_v * x.element_size, 0, rows, to);
    if (found != to) std::memcpy(to, found, rows * sizeof(T));
    for (int64_t r = rows; r < lanes; ++r) to[r] = 0;
  }
}

// add(k, part) adds to each sum of each row what feature k does.
template <int kSums, class T, class Add>
void sum_features(int64_t D, int64_t lanes, double (*sums)[kMostRows], Add add) {
  alignas(64) T part[kSums][kMostRows];
  for (int i = 0; i < kSums; ++i) std::fill_n(sums[i], lanes, 0.0);
  for (int64_t first = 0; first < D; first += kFeaturesAtOnce) {
    for (int i = 0; i < kSums; ++i) std::fill_n(part[i], lanes, T(0));
    for (int64_t k = first; k < std::min(first + kFeaturesAtOnce, D); ++k) add(k, part);
    for (int i = 0; i < kSums; ++i) {
      for (int64_t r = 0; r < lanes; ++r) sums[i][r] += double(part[i][r]);
    }
  }
}

// Of each row what it is scaled by.
template <class T>
struct Scales {
  alignas(64) T base[kMostRows] = {}, offset[kMostRows] = {}, factor[kMostRows];
  FeatureScale scale[kMostRows];
};

// Where T's range is too small for squares.
template <bool kCentred, class T>
Statistics<T> wide_statistics(const T* x, int64_t D, int64_t lanes) {
  const double base = kCentred ? double(x[0]) : 0;
  double mean = 0, squares = 0;
  for (int64_t k = 0; kCentred && k < D; ++k) mean += (double(x[k * lanes]) - base) / double(D);
  for (int64_t k = 0; k < D; ++k) {
    const double d = double(x[k * lanes]) - base - mean;
    squares += d * d;
  }
  return {base, mean, squares};
}

template <Feature F, class T>
void find_scales(const T* x, int64_t D, int64_t lanes, Scales<T>& s) {
  constexpr bool kCentred = F == Feature::kStandardized;
  double sums[1][kMostRows];
  if constexpr (kCentred) {
    std::copy_n(x, lanes, s.base);
    sum_features<1, T>(D, lanes, sums, [&](int64_t k, T(*part)[kMostRows]) {
#pragma omp simd
      for (int64_t r = 0; r < lanes; ++r) part[0][r] += x[k * lanes + r] - s.base[r];
    });
    for (int64_t r = 0; r < lanes; ++r) s.offset[r] = T(sums[0][r] / double(D));
  }
  sum_features<1, T>(D, lanes, sums, [&](int64_t k, T(*part)[kMostRows]) {
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) {
      const T d = kCentred ? (x[k * lanes + r] - s.base[r]) - s.offset[r] : x[k * lanes + r];
      part[0][r] += d * d;
    }
  });
  for (int64_t r = 0; r < lanes; ++r) {
    double squares = sums[0][r];
    if (sizeof(T) == 4 && !in_float_range(squares)) {
      const Statistics<T> wide = wide_statistics<kCentred>(x + r, D, lanes);
      s.offset[r] = T(wide.mean);
      squares = wide.squares;
    }
    s.scale[r] = feature_scale(F, 0, squares, D);
    s.factor[r] = T(s.scale[r].factor);
  }
}

template <class T, Feature F>
FASTKD_HD T scaled_lane(const T* x, int64_t r, const Scales<T>& s) {
  if constexpr (F == Feature::kPlain) return x[r];
  return (F == Feature::kStandardized ? (x[r] - s.base[r]) - s.offset[r] : x[r]) * s.factor[r];
}

template <class T, Feature F, class Distance>
double side_by_side(const FeaturesLayer& layer, const FeaturesCall<T>& call, const Distance& distance, double scale,
                    int64_t row, int64_t rows, T* buffer) {
  constexpr bool kNormalized = F != Feature::kPlain, kCentred = F == Feature::kStandardized;
  const int64_t D = layer.D, lanes = padded(rows);
  T *s = buffer, *t = s + D * lanes;
  load_side_by_side(layer.student, row, rows, D, s);
  load_side_by_side(layer.teacher, row, rows, D, t);
  Scales<T> of_s, of_t;
  if constexpr (kNormalized) {
    find_scales<F>(s, D, lanes, of_s);
    find_scales<F>(t, D, lanes, of_t);
  }
  double sums[3][kMostRows];
  sum_features<3, T>(D, lanes, sums, [&](int64_t k, T(*part)[kMostRows]) {
    const T* student = s + k * lanes;
    T* teacher = t + k * lanes;
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) {
      const T x = scaled_lane<T, F>(student, r, of_s), e = x - scaled_lane<T, F>(teacher, r, of_t);
      const T u = distance.half_slope(e);
      teacher[r] = u;
      part[0][r] += distance.value(e, u);
      if (kCentred) part[1][r] += u;
      if (kNormalized) part[2][r] += x * u;
    }
  });
  double loss = 0;
  alignas(64) T slope_k[kMostRows] = {}, slope_mean[kMostRows] = {}, slope_p[kMostRows] = {};
  alignas(64) bool here[kMostRows] = {};
  for (int64_t r = 0; r < rows; ++r) {
    here[r] = counts(layer, row + r);
    const double weight = row_scale(layer, call, row + r, false);
    loss += keep(layer, call, row + r, here[r] ? sums[0][r] * loss_share(F) * weight : 0);
    const FeatureSlope slope = feature_slope(F, kNormalized ? of_s.scale[r] : FeatureScale(), sums[1][r], sums[2][r], D,
                                             scale * row_scale(layer, call, row + r, true));
    slope_k[r] = T(slope.k);
    slope_mean[r] = T(slope.mean);
    slope_p[r] = T(slope.p);
  }
  if (!layer.grad.data) return loss;
  RowsTensor across = layer.grad;
  across.stride_v = 1;
  char* to = layer.grad.row(row);
  for (int64_t k = 0; k < D; ++k) {
    const T* student = s + k * lanes;
    T* out = t + k * lanes;
#pragma omp simd
    for (int64_t r = 0; r < lanes; ++r) {
      const T g = slope_k[r] * ((out[r] - slope_mean[r]) - scaled_lane<T, F>(student, r, of_s) * slope_p[r]);
      out[r] = here[r] ? g : T(0);
    }
    store_block(across, to + k * layer.grad.stride_v * layer.grad.element_size, 0, rows, out, call.stream);
  }
  return loss;
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
