// Sums the classes of a row beside K of them, on the CPU, and takes a gradient back to all: see fastkd/ops/top_k.py.
// Compiled once per instruction set. The K classes come sorted, so that each block of a row knows which are in it;
// such a block is copied, and they are -inf in the copy. A row's result depends on that row alone.
#include "cpu/complement_kernel.h"

#include <cmath>

#include "cpu/prefetch.h"
#include "cpu/rows_chunks.h"

namespace fastkd::FASTKD_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // classes that are walked at once
constexpr int64_t kPart = 512;    // that are summed at once
inline int64_t part(int64_t begin, int64_t end) { return end - begin < kBlock ? end - begin : kBlock; }

// Asks for the block after one, a part of it beside each part of this one, so that memory and arithmetic overlap;
// left alone the core does one, then the other.
class NextBlock {
 public:
  NextBlock(const RowsTensor& x, const char* row, int64_t begin, int64_t V) {
    if (x.stride_v != 1) return;
    at_ = row + (begin + kBlock) * x.element_size;
    end_ = at_ + part(begin + kBlock, V) * x.element_size;
    size_ = x.element_size;
  }
  void some(int64_t classes) {
    const char* to = end_ - at_ < classes * size_ ? end_ : at_ + classes * size_;
    for (; at_ < to; at_ += 64) __builtin_prefetch(at_);
  }

 private:
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t size_ = 0;
};

// f(index in the block, which of the K) of those that are in a block; next: the first that is not before it.
template <class F>
void each_in(const int64_t* sorted, int64_t K, int64_t& next, int64_t begin, int64_t n, F&& f) {
  for (; next < K && sorted[next] < key_of(begin + n, 0); ++next) {
    f(class_of(sorted[next]) - begin, place_of(sorted[next]));
  }
}

template <class T>
void forward_row(const ComplementParams<T>& P, int64_t row) {
  double* logits = P.logits + row * (P.K + 1);
  if (P.rows.mask && !P.rows.mask[row]) {
    for (int64_t k = 0; k <= P.K; ++k) logits[k] = 0;
    P.sums[row] = {};
    return;
  }
  for (int64_t k = 0; k < P.K; ++k) {
    logits[k] = P.indices[row * P.K + k] < 0 ? -kInf<double> : kInf<double> - kInf<double>;
  }
  const int64_t* sorted = P.sorted + row * P.K;
  const double temperature = P.rows.temperature[row], inverse = 1.0 / temperature;
  const T scale = T(double(kLog2e<T>) * inverse), lowest = exp2_lowest(scale);
  const char* student = P.rows.student.row(row);
  alignas(64) T buffer[kBlock];
  double max = -kInf<double>, total = 0, value = 0;
  int64_t next = 0;
  for (int64_t begin = 0; begin < P.rows.V; begin += kBlock) {
    const int64_t n = part(begin, P.rows.V), m = padded(n);
    const T* z = load_block(P.rows.student, student, begin, n, buffer);
    int64_t before = -1;  // a class may stand twice
    each_in(sorted, P.K, next, begin, n, [&](int64_t i, int64_t k) {
      if (z != buffer) {
        std::memcpy(buffer, z, size_t(m) * sizeof(T));
        z = buffer;
      }
      if (i != before) value = double(buffer[i]);
      logits[k] = value;
      buffer[before = i] = -kInf<T>;
    });
    const T own = finite_max(maximum(z, m));
    NextBlock ahead(P.rows.student, student, begin, P.rows.V);
    T sum = 0;
    for (int64_t first = 0; first < m; first += kPart) {
      const int64_t last = m - first < kPart ? m : first + kPart;
      ahead.some(kPart);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < last; ++i) sum += exp2_scaled(z[i] - own, scale, lowest);
    }
    if (sum == T(0)) continue;
    if (double(own) > max) {
      total *= total == 0 ? 0 : rebase(max, double(own), inverse);
      max = double(own);
    }
    total += double(sum) * rebase(double(own), max, inverse);
  }
  P.sums[row] = {finite_max(max), total};
  logits[P.K] = total == 0 ? -kInf<double> : max + temperature * std::log(total);
}

template <class T>
void backward_row(const ComplementParams<T>& P, int64_t row) {
  const RowsTensor &x = P.rows.student, &addend = P.rows.teacher, &grad = P.rows.grad;
  const char *student = x.row(row), *more = addend.row(row);
  char* out = grad.row(row);
  alignas(64) T buffer[kBlock], of_addend[kBlock], result[kBlock];
  const bool counts = !P.rows.mask || P.rows.mask[row];
  const double* upstream = P.upstream + row * (P.K + 1);
  const int64_t* sorted = P.sorted + row * P.K;
  const T share = T(counts ? P.sums[row].share(upstream[P.K]) : 0), max = T(P.sums[row].max);
  const T scale = T(double(kLog2e<T>) / P.rows.temperature[row]), lowest = exp2_lowest(scale);
  int64_t next = 0;
  for (int64_t begin = 0; begin < P.rows.V; begin += kBlock) {
    const int64_t n = part(begin, P.rows.V), m = padded(n);
    const T* a = P.addend ? load_block(addend, more, begin, n, of_addend) : nullptr;
    if (!counts) {
      for (int64_t i = 0; i < m; ++i) result[i] = T(0);
    } else {
      const T* z = load_block(x, student, begin, n, buffer);
      NextBlock ahead(x, student, begin, P.rows.V);
      for (int64_t first = 0; first < m; first += kChunk) {
        const int64_t last = m - first < kChunk ? m : first + kChunk;
        ahead.some(kChunk);
#pragma omp simd
        for (int64_t i = first; i < last; ++i) result[i] = exp2_scaled(z[i] - max, scale, lowest) * share;
      }
      int64_t before = -1;
      each_in(sorted, P.K, next, begin, n, [&](int64_t i, int64_t k) {
        result[i] = (i == before ? result[i] : T(0)) + T(upstream[k]);
        before = i;
      });
    }
    for (int64_t i = 0; a && i < n; ++i) result[i] += a[i];
    store_block(grad, out, begin, n, result, false);
  }
}

template <class T>
void forward(const ComplementParams<T>& P, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) forward_row(P, row);
}
template <class T>
void backward(const ComplementParams<T>& P, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) backward_row(P, row);
}

template <class T>
constexpr ComplementKernel<T> kKernel{forward<T>, backward<T>};

}  // namespace

template <class T>
const ComplementKernel<T>& complement_kernel() {
  return kKernel<T>;
}
template const ComplementKernel<float>& complement_kernel();
template const ComplementKernel<double>& complement_kernel();

}  // namespace fastkd::FASTKD_ISA
