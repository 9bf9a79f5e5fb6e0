// The launches of strips of pairs as a program without torch, for the sanitizers.
//   strips_main OP DTYPE N CLASSES ROW ROWS SAVE MODE SEED  prints "right" or what is wrong
// OP pkt or triplet; DTYPE 0 float, 1 double; CLASSES of the samples, by their numbers; ROW and ROWS of the strip;
// SAVE 1: weights of triplets are wanted; MODE and SEED: the order of the threads. Every seventh sample is not there,
// some are alike and some nearly. The truth is computed in double from the formulas, without any of the kernels' code.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/pkt_launch.h"
#include "cuda/triplet_launch.h"
#include "testing/memory.h"

extern "C" void cusim_order(int mode, unsigned seed);

using namespace fastkd;

namespace {

constexpr int kFeatures = 5;
constexpr double kMargin = 0.7, kEps = 1e-3;

struct Problem {
  int N, classes, row, rows;
  bool save;
};

struct Random {
  uint64_t state = 7;
  double operator()() {  // in -1 .. 1
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 40) / double(1 << 23) - 1;
  }
};

bool is_valid(int n) { return n % 7 != 3; }

template <class T>
struct Array {
  explicit Array(size_t n) : memory(int64_t(n * sizeof(T))), data(memory.as<T>()), size(n) {}
  template <class F>
  Array(size_t n, F&& f) : Array(n) {
    for (size_t i = 0; i < n; ++i) data[i] = T(f(int(i)));
  }
  Memory memory;
  T* data;
  size_t size;
};

double distance(const double* a, const double* b, size_t n) {
  double off = 0, all = 0;
  for (size_t i = 0; i < n; ++i) {
    off += (a[i] - b[i]) * (a[i] - b[i]);
    all += b[i] * b[i];
  }
  return all > 0 ? std::sqrt(off / all) : std::sqrt(off);
}
template <class T>
double off(const Array<T>& found, const std::vector<double>& right) {
  return distance(std::vector<double>(found.data, found.data + found.size).data(), right.data(), right.size());
}

int report(cudaError_t e, double loss, double sums, double weights, double tolerance) {
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;
  if (loss < tolerance && sums < tolerance && weights < tolerance) return std::puts("right"), 0;
  return std::printf("wrong: off by %g, %g, %g\n", loss, sums, weights), 1;
}

template <class T>
int run_pkt(const Problem& p, double tolerance) {
  Random random;
  const int columns = p.N - p.row;
  const size_t pairs = size_t(p.rows) * size_t(columns);
  const auto uniform = [&](int) { return 0.9 * random(); };
  Array<T> student(pairs, uniform), teacher(pairs, uniform);
  const auto of_sample = [&](int n) { return is_valid(p.row + n) ? 1.5 + random() : 0; };
  const Array<T> valid(columns, [&](int n) { return is_valid(p.row + n); });
  const Array<T> weight(columns, of_sample), scale(columns, of_sample);
  const auto inverse_of = [&](int n) { return of_sample(n) / p.N; };
  const Array<T> inverse(columns, inverse_of), teacher_inverse(columns, inverse_of);
  Array<double> slopes(columns, [](int n) { return 0.25 * n; }), loss(1);
  for (size_t at = 0; at < pairs; ++at) {
    if (valid.data[at / size_t(columns)] * valid.data[at % size_t(columns)] == 0)
      student.data[at] = teacher.data[at] = 0;
  }

  std::vector<double> weights(pairs), sums(slopes.data, slopes.data + columns), total(1);
  const auto one = [&](double k, double h, int i, bool counts) {
    const double s = k * inverse.data[i], t = h * teacher_inverse.data[i], a = 1 - t / (s + kEps);
    if (counts) {
      total[0] += double(weight.data[i]) * (s - t - t * std::log((s + kEps) / (t + kEps)));
      sums[size_t(i)] += s * a;
    }
    return a;
  };
  for (size_t at = 0; at < pairs; ++at) {
    const int i = int(at) / columns, j = int(at) % columns;
    const double both = valid.data[i] * valid.data[j];
    const double k = (student.data[at] + both) / 2, h = (teacher.data[at] + both) / 2;
    const double a = one(k, h, i, true), b = one(k, h, j, j >= p.rows);
    weights[at] = scale.data[i] * a + scale.data[j] * b;
  }

  cuda::PktParams<T> P{};
  P.student = student.data;
  P.teacher = teacher.data;
  P.rows = p.rows;
  P.columns = columns;
  P.valid = valid.data;
  P.student_inverse = inverse.data;
  P.teacher_inverse = teacher_inverse.data;
  P.weight = weight.data;
  P.scale = scale.data;
  P.eps = T(kEps);
  P.slopes = slopes.data;
  P.loss = loss.data;
  const Array<double> workspace(size_t(cuda::pkt_plan(P, nullptr)));
  cuda::pkt_plan(P, workspace.data);
  const cudaError_t e = cuda::pkt_strip(P, nullptr);
  return report(e, off(loss, total), off(slopes, sums), off(student, weights), tolerance);
}

// The samples of a class one after the other, and where those of each sample begin and end.
struct Similar {
  Similar(int N, int classes) : positives(size_t(N)), first(size_t(N)), last(size_t(N)) {
    int64_t at = 0;
    for (int c = 0; c < classes; ++c) {
      const int64_t begin = at;
      for (int n = c; n < N; n += classes) positives.data[at++] = n;
      for (int n = c; n < N; n += classes) {
        first.data[n] = begin;
        last.data[n] = at;
      }
    }
  }
  Array<int64_t> positives, first, last;
};

// Adds a row's triplets to sums and gradient.
template <class T>
void row_truth(const Problem& p, int i, const Array<T>& x, double weight, std::vector<double>& sums,
               std::vector<double>& grad) {
  std::vector<double> d(size_t(p.N)), slope(size_t(p.N));
  int count = 0, negatives = 0;
  const auto similar = [&](int j) { return j % p.classes == i % p.classes; };
  const auto other = [&](int j) { return is_valid(j) && j != i; };
  for (int j = 0; j < p.N; ++j) {
    double squared = 0;
    for (int k = 0; k < kFeatures; ++k) {
      const double difference = double(x.data[i * kFeatures + k]) - double(x.data[j * kFeatures + k]);
      squared += difference * difference;
    }
    d[size_t(j)] = std::sqrt(std::max(squared, 1e-12));
    (similar(j) ? count : negatives) += other(j);
  }
  if (!is_valid(i) || count == 0 || negatives == 0) return;
  sums[2] += double(count) * negatives;
  for (int j = 0; j < p.N; ++j) {
    for (int k = 0; k < p.N && other(j) && similar(j); ++k) {
      const double e = double(T(kMargin)) + d[size_t(j)] - d[size_t(k)];
      if (!other(k) || similar(k) || e <= 0) continue;
      sums[0] += weight / negatives * e;
      sums[1] += 1;
      slope[size_t(j)] += weight / negatives;
      slope[size_t(k)] -= weight / negatives;
    }
  }
  for (int j = 0; j < p.N; ++j) {
    for (int k = 0; k < kFeatures && d[size_t(j)] > 1e-6; ++k) {
      const double difference = double(x.data[i * kFeatures + k]) - double(x.data[j * kFeatures + k]);
      grad[size_t(i * kFeatures + k)] += slope[size_t(j)] / d[size_t(j)] * difference;
      grad[size_t(j * kFeatures + k)] -= slope[size_t(j)] / d[size_t(j)] * difference;
    }
  }
}

// The weights of the strip multiplied: what the op leaves to its caller.
template <class T>
void add_products(const Problem& p, const Array<T>& strip, const Array<T>& x, Array<T>& grad) {
  for (int at = 0; at < p.rows * p.N; ++at) {
    const int i = p.row + at / p.N, j = at % p.N;
    for (int k = 0; k < kFeatures; ++k) {
      const T part = strip.data[at] * (x.data[i * kFeatures + k] - x.data[j * kFeatures + k]);
      grad.data[i * kFeatures + k] += part;
      grad.data[j * kFeatures + k] -= part;
    }
  }
}

template <class T>
int run_triplet(const Problem& p, double tolerance) {
  Random random;
  const size_t elements = size_t(p.N) * kFeatures;
  Array<T> x(elements, [&](int) { return random(); }), grad(elements, [](int) { return 0; });
  for (int n = 1; n < p.N; ++n) {  // some are alike, some nearly
    if (n % 5 != 4) continue;
    for (int k = 0; k < kFeatures; ++k) {
      x.data[n * kFeatures + k] = x.data[(n - 1) * kFeatures + k] + T(n % 10 == 4 ? 0.02 * random() : 0);
    }
  }
  const auto product = [&x](int i, int j) {
    double sum = 0;
    for (int k = 0; k < kFeatures; ++k) sum += double(x.data[i * kFeatures + k]) * double(x.data[j * kFeatures + k]);
    return sum;
  };
  Array<T> strip(size_t(p.rows) * size_t(p.N), [&](int at) { return product(p.row + at / p.N, at % p.N); });
  const Array<T> norms(size_t(p.N), [&](int n) { return product(n, n); });
  const Array<T> weight(size_t(p.N), [&](int n) { return is_valid(n) ? 1.5 + random() : 0; });
  const Array<bool> valid(size_t(p.N), is_valid);
  const Similar similar(p.N, p.classes);
  const Array<int64_t> count(1, [&](int) { return std::count(valid.data, valid.data + p.N, true); });
  Array<double> sums(3);

  cuda::TripletParams<T> P{};
  P.strip = strip.data;
  P.rows = p.rows;
  P.row = p.row;
  P.N = p.N;
  P.D = kFeatures;
  P.x = x.data;
  P.norms = norms.data;
  P.positives = similar.positives.data;
  P.first = similar.first.data;
  P.last = similar.last.data;
  P.length = p.N;
  P.valid = valid.data;
  P.count = count.data;
  P.weight = weight.data;
  P.margin = T(kMargin);
  P.grad = p.save ? grad.data : nullptr;
  P.sums = sums.data;
  const Array<char> workspace(size_t(cuda::triplet_plan(P, nullptr)));
  cuda::triplet_plan(P, workspace.data);
  const cudaError_t e = cuda::triplet_strip(P, nullptr);
  if (p.save) add_products(p, strip, x, grad);

  std::vector<double> right(3), exact(elements);
  for (int i = p.row; i < p.row + p.rows; ++i) row_truth(p, i, x, double(weight.data[i]), right, exact);
  return report(e, off(sums, right), 0, p.save ? off(grad, exact) : 0, tolerance);
}

}  // namespace

int main(int count, char** argument) {
  if (count != 10) return std::puts("strips_main OP DTYPE N CLASSES ROW ROWS SAVE MODE SEED"), 2;
  const auto number = [&](int i) { return atoi(argument[i]); };
  const Problem p{number(3), number(4), number(5), number(6), number(7) != 0};
  cusim_order(number(8), unsigned(number(9)));
  const bool pkt = std::string(argument[1]) == "pkt", single = number(2) == 0;
  if (pkt) return single ? run_pkt<float>(p, 5e-6) : run_pkt<double>(p, 1e-12);
  return single ? run_triplet<float>(p, 5e-6) : run_triplet<double>(p, 1e-12);
}
