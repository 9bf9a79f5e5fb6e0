// The launches of the pairs schedule as a program without torch, for the sanitizers.
//   pairs_main DTYPE N D MODE SEED  prints "right" or what is wrong
// DTYPE 0 half, 1 bfloat16, 2 float, 3 double; MODE and SEED: the order of the threads. The truth is
// computed in double from the formulas, without any of the kernels' code. Some rows are alike, and
// some nearly.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/pairs_launch.h"

extern "C" void cusim_order(int mode, unsigned seed);

using namespace fastkd;

namespace {

constexpr double kDelta = 0.4;

// Memory that begins 16-byte aligned and ends where its last byte does: reading past it is seen.
struct Memory {
  explicit Memory(int64_t bytes) : data(static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16))) {}
  ~Memory() { free(data); }
  Memory(const Memory&) = delete;
  char* data;
};

uint64_t state = 7;
double uniform() {  // in -1 .. 1
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 40) / double(1 << 23) - 1;
}

// Columns of one row lie N elements apart.
template <class S>
Embeddings make(S* data, DType type, int64_t N, int64_t D, std::vector<double>& values) {
  values.resize(N * D);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t d = 0; d < D; ++d) {
      const int64_t like = n % 5 == 4 ? n - 1 : n;  // every fifth row is nearly the one before, and every tenth is it
      const double x = like == n ? uniform() : values[like * D + d] + (n % 10 == 4 ? 0.01 * uniform() : 0);
      data[d * N + n] = S(float(x));
      values[n * D + d] = double(float(data[d * N + n]));
    }
  }
  return {reinterpret_cast<const char*>(data), type, int32_t(sizeof(S)), D, 1, N};
}

double squared(const std::vector<double>& x, int64_t D, int64_t i, int64_t j) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += (x[i * D + d] - x[j * D + d]) * (x[i * D + d] - x[j * D + d]);
  return sum;
}

double truth(const std::vector<double>& x, const std::vector<double>& y, int64_t N, int64_t Dx, int64_t Dy,
             std::vector<double>& grad) {
  std::vector<double> s(N * N), t(N * N);
  double mu = 0, tau = 0, loss = 0, C = 0;
  const double pairs = double(N) * double(N - 1);
  for (int64_t i = 0; i < N * N; ++i) {
    if (i / N == i % N) continue;
    s[i] = std::sqrt(std::fmax(squared(x, Dx, i / N, i % N), 1e-12));
    t[i] = std::sqrt(std::fmax(squared(y, Dy, i / N, i % N), 1e-12));
    mu += s[i] / pairs;
    tau += t[i] / pairs;
  }
  const auto r = [&](int64_t i) { return std::fmin(std::fmax(s[i] / mu - t[i] / tau, -kDelta), kDelta); };
  for (int64_t i = 0; i < N * N; ++i) {
    const double e = std::fabs(s[i] / mu - t[i] / tau);
    loss += e < kDelta ? e * e / 2 : kDelta * (e - kDelta / 2);
    C += r(i) * s[i] / mu / pairs;
  }
  grad.assign(N * Dx, 0);
  for (int64_t i = 0; i < N * N; ++i) {
    if (s[i] <= 1e-6) continue;
    const double w = 2 / (double(N) * double(N) * mu) * (r(i) - C) / s[i];
    for (int64_t d = 0; d < Dx; ++d) grad[i / N * Dx + d] += w * (x[i / N * Dx + d] - x[i % N * Dx + d]);
  }
  return loss / (double(N) * double(N));
}

template <class S, class T, cuda::PairsStorage kStorage>
int run(DType type, int64_t N, int64_t D, double tolerance) {
  const int64_t Dt = D + 1;
  const Memory student(N * D * int64_t(sizeof(S))), teacher(N * Dt * int64_t(sizeof(S)));
  std::vector<double> x, y, exact;
  std::vector<T> grad(N * D, T(NAN));
  T loss = T(NAN);
  cuda::PairsParams P{};
  P.options = {kDelta, true, N};
  P.weight = 1;
  P.student.source = make(reinterpret_cast<S*>(student.data), type, N, D, x);
  P.teacher.source = make(reinterpret_cast<S*>(teacher.data), type, N, Dt, y);
  P.loss = &loss;
  P.grad = grad.data();
  P.grad_dtype = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
  P.grad_element_size = sizeof(T);
  cuda::Device device;
  if (cuda::current_device(device)) return std::puts("no device"), 1;
  const Memory workspace(cuda::pairs_plan(P, kStorage, device, nullptr));
  cuda::pairs_plan(P, kStorage, device, workspace.data);
  if (const cudaError_t e = cuda::pairs_run<kStorage, Relation::kRkdDistance>(P, device, nullptr)) {
    return std::printf("error: %s\n", cudaGetErrorString(e)), 1;
  }
  const double right = truth(x, y, N, D, Dt, exact);
  double off = 0, size = 0;
  for (int64_t i = 0; i < N * D; ++i) {
    off += (double(grad[i]) - exact[i]) * (double(grad[i]) - exact[i]);
    size += exact[i] * exact[i];
  }
  const double wrong_loss = std::fabs(double(loss) - right) / right, wrong = std::sqrt(off / size);
  if (!(wrong_loss < 2e-6 && wrong < tolerance)) return std::printf("wrong: off by %g, %g\n", wrong_loss, wrong), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 6) return std::puts("pairs_main DTYPE N D MODE SEED"), 2;
  const int64_t N = atoi(argument[2]), D = atoi(argument[3]);
  cusim_order(atoi(argument[4]), unsigned(atoi(argument[5])));
  switch (atoi(argument[1])) {
    case 0:
      return run<__half, float, cuda::PairsStorage::kHalf>(DType::kHalf, N, D, 5e-4);
    case 1:
      return run<__nv_bfloat16, float, cuda::PairsStorage::kBFloat16>(DType::kBFloat16, N, D, 5e-3);
    case 2:
      return run<float, float, cuda::PairsStorage::kFloat>(DType::kFloat, N, D, 5e-6);
    default:
      return run<double, double, cuda::PairsStorage::kDouble>(DType::kDouble, N, D, 1e-12);
  }
}
