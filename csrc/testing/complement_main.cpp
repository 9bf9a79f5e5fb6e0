// What sums the classes of a row beside K of them as a program without torch, for the sanitizers.
//   complement_main DTYPE N V K MODE SEED  prints "right" or what is wrong
// DTYPE 0 half, 1 bfloat16, 2 float; MODE and SEED: the order of the threads. The truth is computed in double from the
// formulas, without any of the kernels' code. Row 1 is masked and holds NaN, of the others every seventh class is -inf;
// every fifth of the K is padding, and the gradient goes over the logits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/complement_launch.h"
#include "testing/matrix.h"

extern "C" void cusim_order(int mode, unsigned seed);

using namespace fastkd;

namespace {

constexpr double kTemperature = 1.5;

template <class S, DType kType>
int run(int64_t N, int64_t V, int64_t K) {
  Matrix<S> x(N, V);
  Matrix<float> addend(N, V);
  std::vector<int64_t> indices(N * K);
  std::vector<double> z(N * V), logits(N * (K + 1)), upstream(N * (K + 1));
  std::vector<ComplementSums> sums(N);
  const std::unique_ptr<bool[]> mask(new bool[N]);
  uint64_t state = 7;
  for (int64_t n = 0; n < N; ++n) {
    mask[n] = n != 1;
    for (int64_t v = 0; v < V; ++v) {
      x.at(n, v) = S(n == 1 ? NAN : v % 7 == 3 ? -INFINITY : 3 * number(state));
      z[n * V + v] = double(float(x.at(n, v)));
      addend.at(n, v) = mask[n] ? number(state) : 0;
    }
    for (int64_t k = 0; k < K; ++k) indices[n * K + k] = k % 5 == 4 ? -1 - k : (k * (V / K) + n) % V;
    for (int64_t k = 0; k <= K; ++k) upstream[n * (K + 1) + k] = number(state);
  }
  ComplementParams<float> P{};
  P.rows.N = N;
  P.rows.V = V;
  P.rows.mask = mask.get();
  P.rows.temperature = {nullptr, 0, kTemperature};
  P.rows.student = P.rows.teacher = x.rows(kType);
  P.indices = indices.data();
  P.K = K;
  P.logits = logits.data();
  P.sums = sums.data();
  P.upstream = upstream.data();
  cudaError_t e = cuda::complement(P, false, nullptr);
  P.rows.grad = P.rows.student;
  P.rows.teacher = addend.rows(DType::kFloat);
  P.addend = true;
  if (!e) e = cuda::complement(P, true, nullptr);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;

  double worst = 0;
  const auto compare = [&](double found, double wanted, double unit) {
    const double off = found == wanted ? 0 : std::fabs(found - wanted) / unit;
    if (!(off <= worst)) worst = off;
  };
  const double rounding = kType == DType::kFloat ? 1e-5 : kType == DType::kHalf ? 1e-3 : 8e-3;
  for (int64_t n = 0; n < N; ++n) {
    std::vector<int64_t> place(V, -1);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t v = indices[n * K + k];
      if (v >= 0) place[v] = k;
      compare(logits[n * (K + 1) + k], !mask[n] ? 0 : v < 0 ? -INFINITY : z[n * V + v], 1e-9);
    }
    double total = 0;
    for (int64_t v = 0; v < V; ++v) total += place[v] < 0 ? std::exp(z[n * V + v] / kTemperature) : 0;
    compare(logits[n * (K + 1) + K], mask[n] ? kTemperature * std::log(total) : 0, 1e-4);
    for (int64_t v = 0; v < V; ++v) {
      double right = mask[n] && place[v] >= 0 ? upstream[n * (K + 1) + place[v]] : 0;
      if (mask[n] && place[v] < 0) right = upstream[n * (K + 1) + K] * std::exp(z[n * V + v] / kTemperature) / total;
      right += addend.at(n, v);
      compare(float(x.at(n, v)), right, rounding * std::fmax(1, std::fabs(right)));
    }
  }
  if (!(worst < 2)) return std::printf("wrong: off by %g\n", worst), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 7) return std::puts("complement_main DTYPE N V K MODE SEED"), 2;
  const int64_t N = atoi(argument[2]), V = atoi(argument[3]), K = atoi(argument[4]);
  cusim_order(atoi(argument[5]), unsigned(atoi(argument[6])));
  switch (atoi(argument[1])) {
    case 0:
      return run<__half, DType::kHalf>(N, V, K);
    case 1:
      return run<__nv_bfloat16, DType::kBFloat16>(N, V, K);
    default:
      return run<float, DType::kFloat>(N, V, K);
  }
}
