// What standardizes logits as a program without torch, for the sanitizers.
//   standardize_main DTYPE N V INNER MODE SEED  prints "right" or what is wrong
// INNER: how many rows lie side by side, in runs of that length; 1: none do. DTYPE 0 half, 1 bfloat16, 2 float; MODE
// and SEED: the order of the threads. The truth is computed in double from the formulas, without any of the kernels'
// code. Row 1 is masked and holds NaN, row 2 is constant, and of the others every seventh class is -inf.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/standardize_launch.h"
#include "testing/matrix.h"

extern "C" void cusim_order(int mode, unsigned seed);

using namespace fastkd;

namespace {

template <class S, DType kType>
int run(int64_t N, int64_t V, int64_t inner) {
  Matrix<S> x(N, V, inner), grad(N, V, inner);
  Matrix<float> out(N, V, inner), upstream(N, V, inner), addend(N, V, inner);
  const std::unique_ptr<bool[]> mask(new bool[N]);
  std::vector<RowMoments> moments(N);
  uint64_t state = 7;
  for (int64_t n = 0; n < N; ++n) {
    mask[n] = n != 1;
    for (int64_t v = 0; v < V; ++v) {
      const float drawn = n == 1 ? NAN : n == 2 ? 317.3f : v % 7 == 3 ? -INFINITY : 3 * number(state) + 40;
      x.at(n, v) = S(drawn);
      grad.at(n, v) = S(NAN);
      out.at(n, v) = NAN;
      upstream.at(n, v) = mask[n] ? number(state) : 0;
      addend.at(n, v) = mask[n] ? number(state) : 0;
    }
  }
  StandardizeParams<float> P{};
  P.rows.N = N;
  P.rows.V = V;
  P.rows.mask = mask.get();
  P.rows.student = P.rows.teacher = x.rows(kType);
  P.rows.grad = out.rows(DType::kFloat);
  P.moments = moments.data();
  StandardizeParams<float> back = P;
  back.rows.teacher = upstream.rows(DType::kFloat);
  back.rows.grad = grad.rows(kType);
  back.addend = reinterpret_cast<const char*>(addend.data);
  cudaError_t e = cuda::standardize(P, false, nullptr);
  if (!e) e = cuda::standardize(back, true, nullptr);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;

  double worst = 0;
  const auto compare = [&](double found, double wanted, double unit) {
    const double off = std::fabs(found - wanted) / unit;
    if (!(off <= worst)) worst = off;
  };
  const double rounding = kType == DType::kFloat ? 1e-5 : kType == DType::kHalf ? 1e-3 : 8e-3;
  for (int64_t n = 0; n < N; ++n) {
    double mean = 0, count = 0, squares = 0, sum = 0, along = 0;
    const auto each = [&](auto&& f) {
      for (int64_t v = 0; v < V; ++v) {
        if (!(double(float(x.at(n, v))) == -INFINITY)) f(double(float(x.at(n, v))), v);
      }
    };
    each([&](double s, int64_t) { mean += s, ++count; });
    mean /= count;
    each([&](double s, int64_t v) {
      squares += (s - mean) * (s - mean);
      sum += upstream.at(n, v);
      along += upstream.at(n, v) * (s - mean);
    });
    const double deviation = n == 2 || count < 2 ? 0 : std::sqrt(squares / (count - 1)), scale = 1 / (deviation + 1e-7);
    for (int64_t v = 0; v < V; ++v) {
      const double s = float(x.at(n, v)), c = s - mean;
      if (mask[n] && s == -INFINITY) worst = out.at(n, v) == -INFINITY ? worst : INFINITY;
      if (mask[n] && s != -INFINITY) compare(out.at(n, v), deviation == 0 ? 0 : c * scale, 1e-5);
      double right = mask[n] ? addend.at(n, v) : 0;
      if (mask[n] && s != -INFINITY && deviation > 0) {
        right += scale * (upstream.at(n, v) - sum / count - c * along * scale / ((count - 1) * deviation));
      }
      compare(float(grad.at(n, v)), right, mask[n] ? rounding * std::fmax(1, std::fabs(right)) : 1e-30);
    }
  }
  if (!(worst < 2)) return std::printf("wrong: off by %g\n", worst), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 7) return std::puts("standardize_main DTYPE N V INNER MODE SEED"), 2;
  const int64_t N = atoi(argument[2]), V = atoi(argument[3]), inner = atoi(argument[4]);
  cusim_order(atoi(argument[5]), unsigned(atoi(argument[6])));
  switch (atoi(argument[1])) {
    case 0:
      return run<__half, DType::kHalf>(N, V, inner);
    case 1:
      return run<__nv_bfloat16, DType::kBFloat16>(N, V, inner);
    default:
      return run<float, DType::kFloat>(N, V, inner);
  }
}
