// Attention maps on the CPU: sums over the channels of |x|^p, and their slopes; |x|^p is never stored.
// Compiled once per instruction set. Vectors run across positions where these lie next to each other
// in memory, else across channels.
#include "cpu/attention_kernel.h"

#include <algorithm>
#include <cmath>

#include "cpu/memory.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kPositions = 2048;  // walked side by side: long runs, of which memory sees the next bytes coming
constexpr int64_t kChannels = 1024;   // of one position, at a time
constexpr int64_t kAtOnce = 32;       // added up in T; what they add up to in double

template <class T>
FASTKD_HD T magnitude(T x) {
  return x < 0 ? -x : x;
}

// |x|^p and |x|^(p - 1) sign x; P = 0: any p.
template <int P, class T>
FASTKD_HD T power(T x, T p) {
  const T a = magnitude(x);
  if constexpr (P == 1) return a;
  if constexpr (P == 2) return x * x;
  if constexpr (P == 3) return x * x * a;
  if constexpr (P == 4) return (x * x) * (x * x);
  return std::pow(a, p);
}
template <int P, class T>
FASTKD_HD T slope_of(T x, T p) {
  const T a = magnitude(x);
  if constexpr (P == 1) return x > 0 ? T(1) : x < 0 ? T(-1) : x;  // of NaN itself
  if constexpr (P == 2) return x;
  if constexpr (P == 3) return x * a;
  if constexpr (P == 4) return x * x * x;
  const T y = std::pow(a, p - 1);
  return x < 0 ? -y : x == 0 ? T(0) : y;
}

// f(std::integral_constant<int, P>)
template <class F>
void with_power(double p, F&& f) {
  if (p == 1) return f(std::integral_constant<int, 1>());
  if (p == 2) return f(std::integral_constant<int, 2>());
  if (p == 3) return f(std::integral_constant<int, 3>());
  if (p == 4) return f(std::integral_constant<int, 4>());
  f(std::integral_constant<int, 0>());
}

bool side_by_side(const RowsTensor& x) { return x.stride_v != 1 && x.dims > 0 && x.stride[x.dims - 1] == 1; }
int64_t run(const RowsTensor& x, int64_t row) { return x.size[x.dims - 1] - row % x.size[x.dims - 1]; }

// The elements of one channel as a row.
RowsTensor across(const RowsTensor& x) {
  RowsTensor r = x;
  r.stride_v = 1;
  return r;
}

template <int P, class T>
void powers_across(const RowsTensor& x, int64_t C, T p, int64_t row, int64_t n, double* out) {
  alignas(64) T buffer[kPositions];
  const RowsTensor channel = across(x);
  const char* from = x.row(row);
  std::fill_n(out, n, 0.0);
  for (int64_t first = 0; first < C; first += kAtOnce) {
    alignas(64) T sums[kPositions] = {};
    for (int64_t c = first; c < std::min(first + kAtOnce, C); ++c) {
      const T* v = load_block(channel, from + c * x.stride_v * x.element_size, 0, n, buffer);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) sums[i] += power<P>(v[i], p);
    }
    for (int64_t i = 0; i < n; ++i) out[i] += double(sums[i]);
  }
}

template <int P, class T>
double power_sum(const RowsTensor& x, int64_t C, T p, int64_t row) {
  alignas(64) T buffer[kChannels];
  double total = 0;
  for (int64_t begin = 0; begin < C; begin += kChannels) {
    const int64_t n = std::min(kChannels, C - begin);
    const T* v = load_block(x, x.row(row), begin, n, buffer);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += power<P>(v[i], p);
    total += double(sum);
  }
  return total;
}

template <class T>
void powers(const RowsTensor& x, int64_t C, double p, int64_t begin, int64_t end, double* out) {
  with_power(p, [&](auto P) {
    if (!side_by_side(x)) {
      for (int64_t row = begin; row < end; ++row) out[row - begin] = power_sum<P.value, T>(x, C, T(p), row);
      return;
    }
    for (int64_t row = begin; row < end;) {
      const int64_t n = std::min({end - row, kPositions, run(x, row)});
      powers_across<P.value, T>(x, C, T(p), row, n, out + row - begin);
      row += n;
    }
  });
}

template <int P, class T>
void slopes_across(const RowsTensor& x, const RowsTensor& grad, int64_t C, T p, int64_t row, int64_t n,
                   const double* slope, bool stream) {
  alignas(64) T buffer[kPositions], out[kPositions], factor[kPositions];
  for (int64_t i = 0; i < n; ++i) factor[i] = T(slope[i]);
  const RowsTensor channel = across(x), to_channel = across(grad);
  const char* from = x.row(row);
  char* to = grad.row(row);
  for (int64_t c = 0; c < C; ++c) {
    const T* v = load_block(channel, from + c * x.stride_v * x.element_size, 0, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = factor[i] * slope_of<P>(v[i], p);
    store_block(to_channel, to + c * grad.stride_v * grad.element_size, 0, n, out, stream);
  }
}

template <int P, class T>
void slopes_of_row(const RowsTensor& x, const RowsTensor& grad, int64_t C, T p, int64_t row, T factor, bool stream) {
  alignas(64) T buffer[kChannels], out[kChannels];
  for (int64_t begin = 0; begin < C; begin += kChannels) {
    const int64_t n = std::min(kChannels, C - begin);
    const T* v = load_block(x, x.row(row), begin, n, buffer);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = factor * slope_of<P>(v[i], p);
    store_block(grad, grad.row(row), begin, n, out, stream);
  }
}

template <class T>
void slopes(const RowsTensor& x, const RowsTensor& grad, int64_t C, double p, int64_t begin, int64_t end,
            const double* slope, bool stream) {
  with_power(p, [&](auto P) {
    if (!side_by_side(x) || !side_by_side(grad)) {
      for (int64_t row = begin; row < end; ++row) {
        slopes_of_row<P.value, T>(x, grad, C, T(p), row, T(slope[row - begin]), stream);
      }
      return;
    }
    for (int64_t row = begin; row < end;) {
      const int64_t n = std::min({end - row, kPositions, run(x, row), run(grad, row)});
      slopes_across<P.value, T>(x, grad, C, T(p), row, n, slope + row - begin, stream);
      row += n;
    }
  });
  if (stream) stream_fence();
}

template <class T>
constexpr AttentionKernel<T> kKernel{powers<T>, slopes<T>};

}  // namespace

template <class T>
const AttentionKernel<T>& attention_kernel() {
  return kKernel<T>;
}
template const AttentionKernel<float>& attention_kernel();
template const AttentionKernel<double>& attention_kernel();

}  // namespace fastkd::FASTKD_ISA
