// Loss and gradient of a row whose features lie next to each other, or anyhow, on the CPU: see features_kernel.cpp.
#pragma once
#include <algorithm>

#include "cpu/features_scales.h"
#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

FASTKD_HD BFloat16 narrowed(BFloat16, float x) { return to_bfloat16(x); }
FASTKD_HD Half narrowed(Half, float x) { return to_half(x); }
FASTKD_HD float narrowed(float, float x) { return x; }

// Where all three are of one dtype and features lie next to each other: in one walk, without buffers.
template <class S, class Distance>
double plain_of(const Distance& distance, const void* student, const void* teacher, void* grad, int64_t n, float k,
                bool stream) {
  const S *s = static_cast<const S*>(student), *t = static_cast<const S*>(teacher);
  S* out = static_cast<S*>(grad);
  double loss = 0;
  alignas(64) S chunk[kAtOnce];
  for (int64_t begin = 0; begin < n; begin += kAtOnce) {
    const int64_t m = std::min(kAtOnce, n - begin);
    S* to = stream || !out ? chunk : out + begin;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < m; ++i) {
      const float e = to_float(s[begin + i]) - to_float(t[begin + i]);
      const float u = distance.half_slope(e);
      to[i] = narrowed(S(), k * u);
      sum += distance.value(e, u);
    }
    if (out && stream) {
      stream_copy(reinterpret_cast<char*>(out + begin), reinterpret_cast<const char*>(chunk), m * sizeof(S));
    }
    loss += double(sum);
  }
  return loss;
}

bool alike(const FeaturesLayer& layer) {
  const RowsTensor &s = layer.student, &t = layer.teacher, &g = layer.grad;
  return s.dtype == t.dtype && s.stride_v == 1 && t.stride_v == 1 && (!g.data || g.stride_v == 1);
}

template <class Distance>
double plain_alike(const FeaturesLayer& layer, const Distance& distance, int64_t row, float k, bool stream) {
  const auto of = [&](auto zero) {
    return plain_of<decltype(zero)>(distance, layer.student.row(row), layer.teacher.row(row),
                                    layer.grad.data ? layer.grad.row(row) : nullptr, layer.width(row), k, stream);
  };
  switch (layer.student.dtype) {
    case DType::kHalf:
      return of(Half());
    case DType::kBFloat16:
      return of(BFloat16());
    default:
      return of(float());
  }
}

template <class T, class Distance>
double plain_row(const FeaturesLayer& layer, const FeaturesCall<T>& call, const Distance& distance, double scale,
                 int64_t row, T* buffer) {
  T *student = buffer, *teacher = buffer + kFlatRow, *out = buffer + 2 * kFlatRow;
  const int64_t D = layer.width(row);
  const T k = T(2 * scale * row_scale(layer, call, row, true));
  if constexpr (sizeof(T) == 4) {
    if (alike(layer)) {
      const double loss = plain_alike(layer, distance, row, k, call.stream);
      return keep(layer, call, row, loss * row_scale(layer, call, row, false));
    }
  }
  double loss = 0;
  for (int64_t begin = 0; begin < D; begin += kFlatRow) {
    const int64_t n = D - begin < kFlatRow ? D - begin : kFlatRow;
    const T* s = load_block(layer.student, layer.student.row(row), begin, n, student);
    const T* t = load_block(layer.teacher, layer.teacher.row(row), begin, n, teacher);
    for (int64_t first = 0; first < n; first += kAtOnce) {
      const int64_t last = std::min(first + kAtOnce, n);
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < last; ++i) {
        const T e = s[i] - t[i], u = distance.half_slope(e);
        out[i] = k * u;
        sum += distance.value(e, u);
      }
      loss += double(sum);
    }
    if (layer.grad.data) store_block(layer.grad, layer.grad.row(row), begin, n, out, call.stream);
  }
  return keep(layer, call, row, loss * row_scale(layer, call, row, false));
}

template <class T, Feature F, class Distance>
double normalized_row(const FeaturesLayer& layer, const FeaturesCall<T>& call, const Distance& distance, double scale,
                      int64_t row, T* buffer) {
  constexpr bool kCentred = F == Feature::kStandardized;
  const int64_t D = layer.D;
  T *student = buffer, *teacher = student + padded(D), *slopes = teacher + padded(D);
  const T* s = load_block(layer.student, layer.student.row(row), 0, D, student);
  const T* t = load_block(layer.teacher, layer.teacher.row(row), 0, D, teacher);
  const Statistics<T> of_s = statistics<kCentred>(s, D), of_t = statistics<kCentred>(t, D);
  const FeatureScale scale_s = feature_scale(F, 0, of_s.squares, D), scale_t = feature_scale(F, 0, of_t.squares, D);
  const Scale<T> a = to_scale(scale_s, of_s), b = to_scale(scale_t, of_t);
  double loss = 0, sum_u = 0, sum_xu = 0;
  for (int64_t begin = 0; begin < D; begin += kAtOnce) {
    const int64_t end = std::min(begin + kAtOnce, D);
    T sum = 0, u1 = 0, xu = 0;
#pragma omp simd reduction(+ : sum, u1, xu)
    for (int64_t i = begin; i < end; ++i) {
      const T x = scaled<T, kCentred>(s[i], a), e = x - scaled<T, kCentred>(t[i], b);
      const T u = distance.half_slope(e);
      slopes[i] = u;
      sum += distance.value(e, u);
      u1 += u;
      xu += x * u;
    }
    loss += double(sum);
    sum_u += double(u1);
    sum_xu += double(xu);
  }
  if (layer.grad.data) {
    const FeatureSlope slope = feature_slope(F, scale_s, sum_u, sum_xu, D, scale * row_scale(layer, call, row, true));
    const T k = T(slope.k), mean = T(slope.mean), p = T(slope.p);
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) slopes[i] = k * ((slopes[i] - mean) - scaled<T, kCentred>(s[i], a) * p);
    store_block(layer.grad, layer.grad.row(row), 0, D, slopes, call.stream);
  }
  return keep(layer, call, row, loss * loss_share(F) * row_scale(layer, call, row, false));
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
