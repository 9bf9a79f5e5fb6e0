// What is found of rows besides their loss, as a program without torch, for the sanitizers: the weights of
// adaptive_kl_div, and what kd_loss tells of its parts.
//   of_rows_main WHAT DTYPE N V INNER CLUSTERS MODE SEED  prints "right" or what is wrong
// WHAT 0: the weights, 1: the parts, 2: the parts of coins. INNER: how many rows lie side by side, in runs of that
// length; 1: none do. DTYPE 0 half, 1 bfloat16, 2 float; CLUSTERS 0: a GPU of before clusters, with less shared memory;
// MODE and SEED: the order of the threads. The truth is computed in double from the formulas, without any of the
// kernels' code. Row 1 is masked and holds NaN; of the others every seventh class is -inf on both sides, but for coins.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/head_launch.h"
#include "testing/matrix.h"

extern "C" void cusim_order(int mode, unsigned seed);
extern "C" void cusim_device(int attribute, int value);

using namespace fastkd;

namespace {

constexpr double kTemperature = 1.5, kTeacherTemperature = 2, kMu = 0.5, kSmoothing = 0.1;
using Row = std::vector<double>;

Row log_softmax(const Row& z, double temperature) {
  double max = -INFINITY, sum = 0;
  for (double x : z) max = x > max ? x : max;
  for (double x : z) sum += std::exp((x - max) / temperature);
  Row found;
  for (double x : z) found.push_back((x - max) / temperature - std::log(sum));
  return found;
}

double entropy(const Row& z, double temperature, bool coins) {
  double sum = 0;
  if (coins) {
    for (double x : z) {
      const double p = 1 / (1 + std::exp(-x / temperature));
      sum += p * std::log1p(std::exp(-x / temperature)) + (1 - p) * std::log1p(std::exp(x / temperature));
    }
    return sum;
  }
  for (double log_p : log_softmax(z, temperature)) sum -= log_p == -INFINITY ? 0 : std::exp(log_p) * log_p;
  return sum;
}

// The share of sum |p - q| outside of the head: of the teacher's classes from the best on, those of equal probability
// together, that sum to no more than mu; the best are always in it.
double weight(const Row& s, const Row& t) {
  const Row log_p = log_softmax(s, kTemperature), log_q = log_softmax(t, kTeacherTemperature);
  std::vector<size_t> order;
  for (size_t v = 0; v < t.size(); ++v) order.push_back(v);
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return t[a] > t[b]; });
  double mass = 0, head = 0, tail = 0;
  bool within = true;
  for (size_t first = 0, end; first < order.size(); first = end) {
    double differ = 0;
    for (end = first; end < order.size() && t[order[end]] == t[order[first]]; ++end) {
      const double q = std::exp(log_q[order[end]]);
      mass += q;
      differ += std::fabs(std::exp(log_p[order[end]]) - q);
    }
    within = within && (first == 0 || mass <= kMu);
    (within ? head : tail) += differ;
  }
  return tail / (head + tail);
}

RowParts parts(const Row& s, const Row& t, size_t target, bool coins) {
  RowParts found{};
  const Row log_p = log_softmax(s, 1);
  found.hard = -(1 - kSmoothing) * log_p[target];
  for (double x : log_p) found.hard -= kSmoothing / double(s.size()) * x;
  found.student_entropy = entropy(s, kTemperature, coins);
  found.teacher_entropy = entropy(t, kTeacherTemperature, coins);
  found.agreement =
      std::max_element(s.begin(), s.end()) - s.begin() == std::max_element(t.begin(), t.end()) - t.begin();
  return found;
}

template <class S, DType kType>
int run(int what, int64_t N, int64_t V, int64_t inner) {
  Matrix<S> student(N, V, inner), teacher(N, V, inner);
  const std::unique_ptr<bool[]> mask(new bool[N]);
  std::vector<int64_t> target(N);
  uint64_t state = 7;
  for (int64_t n = 0; n < N; ++n) {
    mask[n] = n != 1;
    target[n] = n == 1 ? -100 : n % 2 ? V - 1 : 7 * n % V;
    for (int64_t v = 0; v < V; ++v) {
      const bool impossible = what == 0 && v % 7 == 3;
      student.at(n, v) = S(n == 1 ? NAN : impossible ? -INFINITY : 3 * number(state));
      teacher.at(n, v) = S(n == 1 ? NAN : impossible ? -INFINITY : 3 * number(state));
    }
  }
  cuda::Device device;
  if (cuda::current_device(device)) return std::puts("no device"), 1;
  std::vector<double> weights(N, NAN);
  std::vector<RowParts> told(N, RowParts{NAN, NAN, NAN, NAN, NAN});
  RowsParams<float> P{};
  P.divergence = what == 2 ? Divergence::kBernoulliKL : Divergence::kForwardKL;
  P.N = N;
  P.V = V;
  P.student = student.rows(kType);
  P.teacher = teacher.rows(kType);
  P.parameter.of_all = kMu;
  P.temperature.of_all = kTemperature;
  P.teacher_temperature.of_all = kTeacherTemperature;
  P.mask = mask.get();
  P.hard = {target.data(), TargetLoss::kCrossEntropy, 0.5, 0.5, kSmoothing};
  P.parts = told.data();
  const cudaError_t e =
      what == 0 ? cuda::head_weight<float>(P, device, weights.data(), nullptr) : cuda::rows_parts<float>(P, nullptr);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;

  double worst = 0;
  const auto compare = [&](double found, double wanted) {
    const double off = found == wanted ? 0 : std::fabs(found - wanted) / (4e-6 * std::fmax(1, std::fabs(wanted)));
    if (!(off <= worst)) worst = off;
  };
  for (int64_t n = 0; n < N; ++n) {
    Row s, t;
    for (int64_t v = 0; v < V; ++v) {
      s.push_back(float(student.at(n, v)));
      t.push_back(float(teacher.at(n, v)));
    }
    if (what == 0) {
      compare(weights[n], mask[n] ? weight(s, t) : 0.5);
      continue;
    }
    const RowParts right = mask[n] ? parts(s, t, size_t(target[n]), what == 2) : RowParts{};
    compare(told[n].hard, right.hard);
    compare(told[n].student_entropy, right.student_entropy);
    compare(told[n].teacher_entropy, right.teacher_entropy);
    compare(told[n].agreement, right.agreement);
  }
  if (!(worst < 4)) return std::printf("wrong: off by %g\n", worst), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 9) return std::puts("of_rows_main WHAT DTYPE N V INNER CLUSTERS MODE SEED"), 2;
  const int what = atoi(argument[1]);
  const int64_t N = atoi(argument[3]), V = atoi(argument[4]), inner = atoi(argument[5]);
  if (!atoi(argument[6])) {
    cusim_device(int(cudaDevAttrComputeCapabilityMajor), 8);
    cusim_device(int(cudaDevAttrMaxSharedMemoryPerBlockOptin), 48 << 10);
  }
  cusim_order(atoi(argument[7]), unsigned(atoi(argument[8])));
  switch (atoi(argument[2])) {
    case 0:
      return run<__half, DType::kHalf>(what, N, V, inner);
    case 1:
      return run<__nv_bfloat16, DType::kBFloat16>(what, N, V, inner);
    default:
      return run<float, DType::kFloat>(what, N, V, inner);
  }
}
