// The elements schedule on the CPU: distances between rows of features [N, D] of student and teacher,
// and their gradient, by the formulas of math/feature.h. Compiled once per instruction set.
//
// A row is read from memory once; its statistics, the sums of its differences and its gradient are
// three walks over what is in cache then. Traffic: student + teacher + gradient, once each.
#include "cpu/elements_kernel.h"

#include <algorithm>

#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

// The mean as a value of the row and what lies between: exact where all values are equal, and of a
// row far from 0 the differences keep their digits.
template <class T>
struct Scale {
  T base = 0, offset = 0, factor = 1;
};

template <class T>
struct Statistics {
  double base, mean, squares;  // mean: beyond the base; squares: of what both were taken from
};

template <class T, bool kCentred>
FASTKD_HD T scaled(T value, const Scale<T>& scale) {
  return (kCentred ? (value - scale.base) - scale.offset : value) * scale.factor;
}

// Elements that are added up in T; what they add up to in double.
constexpr int64_t kAtOnce = 512;

// In S: T, or double where T's range is too small for squares.
template <class S, bool kCentred, class T>
Statistics<T> statistics_in(const T* x, int64_t n) {
  const S base = kCentred ? S(x[0]) : S(0);
  S mean = 0;
  if constexpr (kCentred) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kAtOnce) {
      const int64_t end = std::min(begin + kAtOnce, n);
      S sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = begin; i < end; ++i) sum += S(x[i]) - base;
      total += double(sum);
    }
    mean = S(total / double(n));
  }
  double squares = 0;
  for (int64_t begin = 0; begin < n; begin += kAtOnce) {
    const int64_t end = std::min(begin + kAtOnce, n);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const S d = kCentred ? (S(x[i]) - base) - mean : S(x[i]);
      sum += d * d;
    }
    squares += double(sum);
  }
  return {double(base), double(mean), double(squares)};
}

template <bool kCentred, class T>
Statistics<T> statistics(const T* x, int64_t n) {
  const Statistics<T> s = statistics_in<T, kCentred>(x, n);
  if (sizeof(T) == 4 && !(s.squares > 1e-30 && s.squares < 1e37)) return statistics_in<double, kCentred>(x, n);
  return s;
}

template <class T>
Scale<T> to_scale(const FeatureScale& f, const Statistics<T>& s) {
  return {T(s.base), T(s.mean), T(f.factor)};
}

// What a row's loss and gradient are multiplied by.
template <class T>
double row_scale(const ElementsLayer& layer, const ElementsCall<T>& call, int64_t row, bool gradient) {
  double scale = layer.weight ? double(static_cast<const T*>(layer.weight)[row]) : 1.0;
  if (gradient && call.upstream) scale *= double(call.upstream[(layer.first_row + row) * call.upstream_stride]);
  return scale;
}

template <class T>
double keep(const ElementsLayer& layer, const ElementsCall<T>& call, int64_t row, double loss) {
  if (call.row_loss) call.row_loss[layer.first_row + row] = T(loss * layer.layer_weight);
  return loss;
}

inline bool counts(const ElementsLayer& layer, int64_t row) { return !layer.mask || layer.mask[row]; }

template <class T>
void zero_row(const RowsTensor& grad, int64_t row, int64_t D, T* buffer) {
  for (int64_t i = 0; i < D; ++i) buffer[i] = 0;
  store_block(grad, grad.row(row), 0, D, buffer, false);
}

// A row whose features lie next to each other, or anyhow.

template <class T>
double squares_row(const ElementsLayer& layer, const ElementsCall<T>& call, double scale, int64_t row, T* buffer) {
  T *student = buffer, *teacher = buffer + kFlatRow, *out = buffer + 2 * kFlatRow;
  const int64_t D = layer.width(row);
  const T k = T(2 * scale * row_scale(layer, call, row, true));
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
        const T e = s[i] - t[i];
        out[i] = k * e;
        sum += e * e;
      }
      loss += double(sum);
    }
    if (layer.grad.data) store_block(layer.grad, layer.grad.row(row), begin, n, out, call.stream);
  }
  return keep(layer, call, row, loss * row_scale(layer, call, row, false));
}

template <class T, Feature F>
double normalized_row(const ElementsLayer& layer, const ElementsCall<T>& call, double scale, int64_t row, T* buffer) {
  constexpr bool kCentred = F == Feature::kStandardized;
  const int64_t D = layer.D;
  T *student = buffer, *teacher = student + padded(D), *difference = teacher + padded(D);
  const T* s = load_block(layer.student, layer.student.row(row), 0, D, student);
  const T* t = load_block(layer.teacher, layer.teacher.row(row), 0, D, teacher);
  const Statistics<T> of_s = statistics<kCentred>(s, D), of_t = statistics<kCentred>(t, D);
  const FeatureScale scale_s = feature_scale(F, 0, of_s.squares, D), scale_t = feature_scale(F, 0, of_t.squares, D);
  const Scale<T> a = to_scale(scale_s, of_s), b = to_scale(scale_t, of_t);
  double squares = 0, sum_e = 0, sum_xe = 0;
  for (int64_t begin = 0; begin < D; begin += kAtOnce) {
    const int64_t end = std::min(begin + kAtOnce, D);
    T ee = 0, e1 = 0, xe = 0;
#pragma omp simd reduction(+ : ee, e1, xe)
    for (int64_t i = begin; i < end; ++i) {
      const T x = scaled<T, kCentred>(s[i], a), e = x - scaled<T, kCentred>(t[i], b);
      difference[i] = e;
      ee += e * e;
      e1 += e;
      xe += x * e;
    }
    squares += double(ee);
    sum_e += double(e1);
    sum_xe += double(xe);
  }
  if (layer.grad.data) {
    const FeatureSlope slope = feature_slope(F, scale_s, sum_e, sum_xe, D, scale * row_scale(layer, call, row, true));
    const T k = T(slope.k), mean = T(slope.mean), p = T(slope.p);
#pragma omp simd
    for (int64_t i = 0; i < D; ++i) difference[i] = k * ((difference[i] - mean) - scaled<T, kCentred>(s[i], a) * p);
    store_block(layer.grad, layer.grad.row(row), 0, D, difference, call.stream);
  }
  return keep(layer, call, row, squares * loss_share(F) * row_scale(layer, call, row, false));
}

// Up to kSideBySide rows that lie next to each other: vectors run across the rows.

// Rows of [D][kSideBySide] that are there: of the others the values are 0.
template <class T>
void load_side_by_side(const RowsTensor& x, int64_t row, int64_t rows, int64_t D, T* buffer) {
  RowsTensor across = x;  // a block of it: one feature of all rows
  across.stride_v = 1;
  const char* from = x.row(row);
  for (int64_t k = 0; k < D; ++k) {
    T* to = buffer + k * kSideBySide;
    const T* found = load_block(across, from + k * x.stride_v * x.element_size, 0, rows, to);
    if (found != to) std::memcpy(to, found, rows * sizeof(T));
    for (int64_t r = rows; r < kSideBySide; ++r) to[r] = 0;
  }
}

// Sums of so many features in T, what they add up to in double.
constexpr int64_t kFeaturesAtOnce = 32;

// add(k, r) is what feature k of row r adds to each of the sums.
template <int kSums, class T, class Add>
void sums_side_by_side(int64_t D, double (*sums)[kSideBySide], Add add) {
  for (int i = 0; i < kSums; ++i) std::fill_n(sums[i], kSideBySide, 0.0);
  for (int64_t first = 0; first < D; first += kFeaturesAtOnce) {
    const int64_t last = first + kFeaturesAtOnce < D ? first + kFeaturesAtOnce : D;
    alignas(64) T part[kSums][kSideBySide] = {};
    for (int64_t k = first; k < last; ++k) add(k, part);
    for (int i = 0; i < kSums; ++i) {
      for (int64_t r = 0; r < kSideBySide; ++r) sums[i][r] += double(part[i][r]);
    }
  }
}

template <bool kCentred, class T>
void statistics_side_by_side(const T* x, int64_t D, Statistics<T>* out) {
  double sums[1][kSideBySide];
  alignas(64) T base[kSideBySide] = {}, mean[kSideBySide] = {};
  if constexpr (kCentred) {
    std::copy_n(x, kSideBySide, base);
    sums_side_by_side<1, T>(D, sums, [&](int64_t k, T(*part)[kSideBySide]) {
#pragma omp simd
      for (int64_t r = 0; r < kSideBySide; ++r) part[0][r] += x[k * kSideBySide + r] - base[r];
    });
    for (int64_t r = 0; r < kSideBySide; ++r) mean[r] = T(sums[0][r] / double(D));
  }
  sums_side_by_side<1, T>(D, sums, [&](int64_t k, T(*part)[kSideBySide]) {
#pragma omp simd
    for (int64_t r = 0; r < kSideBySide; ++r) {
      const T d = kCentred ? (x[k * kSideBySide + r] - base[r]) - mean[r] : x[k * kSideBySide + r];
      part[0][r] += d * d;
    }
  });
  for (int64_t r = 0; r < kSideBySide; ++r) {
    out[r] = {double(base[r]), double(mean[r]), sums[0][r]};
    if (sizeof(T) == 8 || (out[r].squares > 1e-30 && out[r].squares < 1e37)) continue;
    double sum = 0, squares = 0;
    for (int64_t k = 0; kCentred && k < D; ++k) sum += double(x[k * kSideBySide + r]) - out[r].base;
    for (int64_t k = 0; k < D; ++k) {
      const double d = double(x[k * kSideBySide + r]) - out[r].base - sum / double(D);
      squares += d * d;
    }
    out[r].mean = sum / double(D);
    out[r].squares = squares;
  }
}

template <class T>
struct ScalesSideBySide {
  alignas(64) T base[kSideBySide], offset[kSideBySide], factor[kSideBySide];
  FeatureScale scale[kSideBySide];
};

template <Feature F, class T>
ScalesSideBySide<T> scales_side_by_side(const T* x, int64_t D) {
  ScalesSideBySide<T> s;
  Statistics<T> of[kSideBySide] = {};
  if constexpr (F != Feature::kSquares) statistics_side_by_side<F == Feature::kStandardized>(x, D, of);
  for (int64_t r = 0; r < kSideBySide; ++r) {
    s.scale[r] = feature_scale(F, 0, of[r].squares, D);
    s.base[r] = T(of[r].base);
    s.offset[r] = T(of[r].mean);
    s.factor[r] = T(s.scale[r].factor);
  }
  return s;
}

template <class T, Feature F>
double side_by_side(const ElementsLayer& layer, const ElementsCall<T>& call, double scale, int64_t row, int64_t rows,
                    T* buffer) {
  constexpr bool kNormalized = F != Feature::kSquares, kCentred = F == Feature::kStandardized;
  const int64_t D = layer.D;
  T *s = buffer, *t = s + D * kSideBySide;
  load_side_by_side(layer.student, row, rows, D, s);
  load_side_by_side(layer.teacher, row, rows, D, t);
  const ScalesSideBySide<T> of_s = scales_side_by_side<F>(s, D), of_t = scales_side_by_side<F>(t, D);
  const auto value = [](const T* x, int64_t k, int64_t r, const ScalesSideBySide<T>& of) {
    const T v = x[k * kSideBySide + r];
    if constexpr (!kNormalized) return v;
    return (kCentred ? (v - of.base[r]) - of.offset[r] : v) * of.factor[r];
  };
  double sums[3][kSideBySide];
  sums_side_by_side<3, T>(D, sums, [&](int64_t k, T(*part)[kSideBySide]) {
#pragma omp simd
    for (int64_t r = 0; r < kSideBySide; ++r) {
      const T x = value(s, k, r, of_s), e = x - value(t, k, r, of_t);
      t[k * kSideBySide + r] = e;
      part[0][r] += e * e;
      if (kCentred) part[1][r] += e;
      if (kNormalized) part[2][r] += x * e;
    }
  });
  double loss = 0;
  alignas(64) T slope_k[kSideBySide] = {}, slope_mean[kSideBySide] = {}, slope_p[kSideBySide] = {};
  alignas(64) bool here[kSideBySide] = {};
  for (int64_t r = 0; r < rows; ++r) {
    here[r] = counts(layer, row + r);
    const double weight = row_scale(layer, call, row + r, false);
    loss += keep(layer, call, row + r, here[r] ? sums[0][r] * loss_share(F) * weight : 0);
    const FeatureSlope slope =
        feature_slope(F, of_s.scale[r], sums[1][r], sums[2][r], D, scale * row_scale(layer, call, row + r, true));
    slope_k[r] = T(slope.k);
    slope_mean[r] = T(slope.mean);
    slope_p[r] = T(slope.p);
  }
  if (!layer.grad.data) return loss;
  RowsTensor across = layer.grad;
  across.stride_v = 1;
  char* to = layer.grad.row(row);
  for (int64_t k = 0; k < D; ++k) {
    T* out = t + k * kSideBySide;
#pragma omp simd
    for (int64_t r = 0; r < kSideBySide; ++r) {
      const T g = slope_k[r] * ((out[r] - slope_mean[r]) - value(s, k, r, of_s) * slope_p[r]);
      out[r] = here[r] ? g : T(0);
    }
    store_block(across, to + k * layer.grad.stride_v * layer.grad.element_size, 0, rows, out, false);
  }
  return loss;
}

bool rows_lie_side_by_side(const RowsTensor& x) { return x.stride_v != 1 && x.dims > 0 && x.stride[x.dims - 1] == 1; }

bool lie_side_by_side(const ElementsLayer& layer) {
  const auto fits = [](const RowsTensor& x) { return rows_lie_side_by_side(x); };
  return layer.D > 1 && fits(layer.student) && fits(layer.teacher) && (!layer.grad.data || fits(layer.grad));
}

// How many rows from this one on lie next to each other.
int64_t run(const RowsTensor& x, int64_t row) { return x.size[x.dims - 1] - row % x.size[x.dims - 1]; }

template <class T, Feature F>
double rows(const ElementsLayer& layer, const ElementsCall<T>& call, double scale, int64_t begin, int64_t end,
            void* scratch) {
  T* buffer = static_cast<T*>(scratch);
  double loss = 0;
  if (lie_side_by_side(layer)) {
    for (int64_t row = begin; row < end;) {
      int64_t n = end - row < kSideBySide ? end - row : kSideBySide;
      n = std::min({n, run(layer.student, row), run(layer.teacher, row), layer.grad.data ? run(layer.grad, row) : n});
      loss += side_by_side<T, F>(layer, call, scale, row, n, buffer);
      row += n;
    }
    return loss;
  }
  for (int64_t row = begin; row < end; ++row) {
    if (!counts(layer, row)) {
      keep(layer, call, row, 0);
      if (layer.grad.data) zero_row(layer.grad, row, layer.D, buffer);
    } else if constexpr (F == Feature::kSquares) {
      loss += squares_row(layer, call, scale, row, buffer);
    } else {
      loss += normalized_row<T, F>(layer, call, scale, row, buffer);
    }
  }
  if (call.stream) stream_fence();
  return loss;
}

template <class T>
int64_t scratch_bytes(const ElementsLayer& layer) {
  if (lie_side_by_side(layer)) return 2 * layer.D * kSideBySide * int64_t(sizeof(T));
  return 3 * (layer.D > kFlatRow ? padded(layer.D) : kFlatRow) * int64_t(sizeof(T));
}

template <class T, Feature F>
constexpr ElementsKernel<T> kKernel{rows<T, F>, scratch_bytes<T>};

}  // namespace

template <class T>
const ElementsKernel<T>& elements_kernel(Feature feature) {
  switch (feature) {
    case Feature::kL2:
      return kKernel<T, Feature::kL2>;
    case Feature::kStandardized:
      return kKernel<T, Feature::kStandardized>;
    case Feature::kCosine:
      return kKernel<T, Feature::kCosine>;
    default:
      return kKernel<T, Feature::kSquares>;
  }
}
template const ElementsKernel<float>& elements_kernel(Feature);
template const ElementsKernel<double>& elements_kernel(Feature);

}  // namespace fastkd::FASTKD_ISA
