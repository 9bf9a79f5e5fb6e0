// The features schedule on the CPU: distances between rows of features [N, D] of student and teacher,
// and their gradient, by the formulas of math/feature.h. Compiled once per instruction set.
//
// A row is read from memory once; its statistics, the sums of its differences and its gradient are
// three walks over what is in cache then. Traffic: student + teacher + gradient, once each.
#include "cpu/features_kernel.h"

#include <algorithm>

#include "common/enum.h"
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
  if (sizeof(T) == 4 && !in_float_range(s.squares)) return statistics_in<double, kCentred>(x, n);
  return s;
}

template <class T>
Scale<T> to_scale(const FeatureScale& f, const Statistics<T>& s) {
  return {T(s.base), T(s.mean), T(f.factor)};
}

// What a row's loss and gradient are multiplied by.
template <class T>
double row_scale(const FeaturesLayer& layer, const FeaturesCall<T>& call, int64_t row, bool gradient) {
  double scale = layer.weight ? double(static_cast<const T*>(layer.weight)[row]) : 1.0;
  if (gradient && call.upstream) scale *= double(call.upstream[(layer.first_row + row) * call.upstream_stride]);
  return scale;
}

template <class T>
double keep(const FeaturesLayer& layer, const FeaturesCall<T>& call, int64_t row, double loss) {
  if (call.row_loss) call.row_loss[layer.first_row + row] = T(loss * layer.layer_weight);
  return loss;
}

inline bool counts(const FeaturesLayer& layer, int64_t row) { return !layer.mask || layer.mask[row]; }

template <class T>
void zero_row(const RowsTensor& grad, int64_t row, int64_t D, T* buffer) {
  for (int64_t i = 0; i < D; ++i) buffer[i] = 0;
  store_block(grad, grad.row(row), 0, D, buffer, false);
}

// A row whose features lie next to each other, or anyhow.

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

// Rows that lie next to each other, as the positions of [B, C, H, W] do: vectors run across the rows.
// Buffers are [D][lanes], lanes the padded number of rows.

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

bool rows_lie_side_by_side(const RowsTensor& x) { return x.stride_v != 1 && x.dims > 0 && x.stride[x.dims - 1] == 1; }

bool lie_side_by_side(const FeaturesLayer& layer) {
  return layer.D > 1 && rows_lie_side_by_side(layer.student) && rows_lie_side_by_side(layer.teacher) &&
         (!layer.grad.data || rows_lie_side_by_side(layer.grad));
}

// How many rows lie next to each other, from this one on.
int64_t run(const RowsTensor& x, int64_t row) { return x.size[x.dims - 1] - row % x.size[x.dims - 1]; }

// Runs in equal parts that fit a tile; several of them where they are short.
template <class T>
int64_t tile_rows(const FeaturesLayer& layer) {
  const int64_t length = std::min(run(layer.student, 0), run(layer.teacher, 0));
  const int64_t fits = kTileBytes / (2 * layer.D * int64_t(sizeof(T))) / kLanes * kLanes;
  const int64_t most = std::clamp(fits, kLanes, kMostRows);
  const int64_t parts = (length + most - 1) / most;
  return (length + parts - 1) / parts;
}

template <class T>
int64_t block_rows(const FeaturesLayer& layer) {
  const int64_t rows = kBlock / layer.D + 1;
  if (!lie_side_by_side(layer)) return rows;
  const int64_t tile = tile_rows<T>(layer);
  return std::max(rows / tile, int64_t(1)) * tile;
}

template <class T>
int64_t scratch_bytes(const FeaturesLayer& layer) {
  const int64_t row = layer.D > kFlatRow ? padded(layer.D) : kFlatRow;
  const int64_t elements = lie_side_by_side(layer) ? 2 * layer.D * padded(tile_rows<T>(layer)) : 3 * row;
  return elements * int64_t(sizeof(T));
}

template <class T, Feature F, class Distance>
double rows(const FeaturesLayer& layer, const FeaturesCall<T>& call, double scale, int64_t begin, int64_t end,
            void* scratch) {
  T* buffer = static_cast<T*>(scratch);
  const Distance distance(call.smooth_l1);
  double loss = 0;
  if (lie_side_by_side(layer)) {
    const int64_t tile = tile_rows<T>(layer);
    for (int64_t row = begin; row < end;) {
      int64_t n = std::min({end - row, tile, run(layer.student, row), run(layer.teacher, row)});
      if (layer.grad.data) n = std::min(n, run(layer.grad, row));
      loss += side_by_side<T, F>(layer, call, distance, scale, row, n, buffer);
      row += n;
    }
  } else {
    for (int64_t row = begin; row < end; ++row) {
      if (!counts(layer, row)) {
        keep(layer, call, row, 0);
        if (layer.grad.data) zero_row(layer.grad, row, layer.D, buffer);
      } else if constexpr (F == Feature::kPlain) {
        loss += plain_row(layer, call, distance, scale, row, buffer);
      } else {
        loss += normalized_row<T, F>(layer, call, distance, scale, row, buffer);
      }
    }
  }
  if (call.stream) stream_fence();
  return loss;
}

template <class T, Feature F, class Distance>
constexpr FeaturesKernel<T> kKernel{rows<T, F, Distance>, block_rows<T>, scratch_bytes<T>};

}  // namespace

template <class T>
const FeaturesKernel<T>& features_kernel(Feature feature, bool smooth_l1) {
  return with_constant(feature, [&](auto k) -> const FeaturesKernel<T>& {
    if constexpr (k.value != Feature::kCosine) {  // which is of squares
      if (smooth_l1) return kKernel<T, k.value, SmoothL1<T>>;
    }
    return kKernel<T, k.value, Squares<T>>;
  });
}
template const FeaturesKernel<float>& features_kernel(Feature, bool);
template const FeaturesKernel<double>& features_kernel(Feature, bool);

}  // namespace fastkd::FASTKD_ISA
