// The launches of the dist schedule as a program without torch, for the sanitizers.
//   dist_main DTYPE N V INNER MASKED MODE SEED  prints "right" or what is wrong
// INNER: how many rows lie side by side, in runs of that length; 1: none do. DTYPE 0 half, 1 bfloat16, 2 float,
// 3 double; MODE and SEED: the order of the threads. The truth is computed in double from the formula, without any of
// the kernels' code.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/dist_launch.h"
#include "testing/matrix.h"

extern "C" void cusim_order(int mode, unsigned seed);

using namespace fastkd;

namespace {

constexpr double kInter = 0.7, kIntra = 1.5, kTemperature = 2.0, kEps = 1e-8;

using Table = std::vector<std::vector<double>>;

// The standard library's generators are templates, which the linker would share with cusim's.
struct Uniform {
  uint64_t state = 7;
  double operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return 6 * double(state >> 40) / double(1 << 24) - 3;
  }
};

std::vector<double> softmax(const std::vector<double>& z) {
  double sum = 0;
  std::vector<double> p;
  for (double x : z) p.push_back(std::exp(x / kTemperature));
  for (double x : p) sum += x;
  for (double& x : p) x /= sum;
  return p;
}

// 1 - ab / (|a| |b| + eps), and its gradient with respect to p.
double uncorrelated(std::vector<double> p, std::vector<double> q, std::vector<double>& grad) {
  double aa = 0, bb = 0, ab = 0;
  for (std::vector<double>* x : {&p, &q}) {
    double mean = 0;
    for (double y : *x) mean += y / double(x->size());
    for (double& y : *x) y -= mean;
  }
  for (size_t i = 0; i < p.size(); ++i) {
    aa += p[i] * p[i];
    bb += q[i] * q[i];
    ab += p[i] * q[i];
  }
  const double a = std::sqrt(aa), b = std::sqrt(bb), size = a * b + kEps;
  for (size_t i = 0; i < p.size(); ++i) grad.push_back(ab * b / a * p[i] / (size * size) - q[i] / size);
  return 1 - ab / size;
}

// Of rows that count alone.
double truth(const Table& s, const Table& t, Table& grad) {
  const size_t N = s.size(), V = s[0].size();
  Table p, q;
  for (size_t n = 0; n < N; ++n) {
    p.push_back(softmax(s[n]));
    q.push_back(softmax(t[n]));
  }
  double loss = 0;
  const double square = kTemperature * kTemperature;
  grad.assign(N, std::vector<double>(V, 0));
  for (size_t n = 0; n < N; ++n) {
    std::vector<double> slope;
    loss += kInter * square * uncorrelated(p[n], q[n], slope) / double(N);
    for (size_t v = 0; v < V; ++v) grad[n][v] += kInter * square * slope[v] / double(N);
  }
  for (size_t v = 0; v < V; ++v) {
    std::vector<double> x, y, slope;
    for (size_t n = 0; n < N; ++n) {
      x.push_back(p[n][v]);
      y.push_back(q[n][v]);
    }
    loss += kIntra * square * uncorrelated(x, y, slope) / double(V);
    for (size_t n = 0; n < N; ++n) grad[n][v] += kIntra * square * slope[n] / double(V);
  }
  for (size_t n = 0; n < N; ++n) {
    double sum = 0;
    for (size_t v = 0; v < V; ++v) sum += p[n][v] * grad[n][v];
    for (size_t v = 0; v < V; ++v) grad[n][v] = p[n][v] * (grad[n][v] - sum) / kTemperature;
  }
  return loss;
}

template <class T, class S, DType kType>
int run(int64_t N, int64_t V, int64_t inner, bool masked) {
  const Matrix<S> student(N, V, inner), teacher(N, V, inner), grad(N, V, inner);
  const Memory of_rows(N * sizeof(DistRow)), columns(3 * dist_padded(V) * sizeof(T));
  Uniform uniform;
  for (int64_t i = 0; i < N * V; ++i) {
    student.data[i] = S(T(uniform()));
    teacher.data[i] = S(T(uniform()));
  }
  const std::unique_ptr<bool[]> mask(new bool[N]);
  Table s, t, exact;
  for (int64_t n = 0; n < N; ++n) {
    mask[n] = !masked || n % 3 != 1;
    if (!mask[n]) continue;
    s.emplace_back();
    t.emplace_back();
    for (int64_t v = 0; v < V; ++v) {
      s.back().push_back(double(T(student.at(n, v))));
      t.back().push_back(double(T(teacher.at(n, v))));
    }
  }
  const double wanted = truth(s, t, exact), scale = 1 / double(s.size());

  DistParams<T> P{};
  P.rows.N = N;
  P.rows.V = V;
  P.rows.student = student.rows(kType);
  P.rows.teacher = teacher.rows(kType);
  P.rows.temperature.of_all = P.rows.teacher_temperature.of_all = kTemperature;
  P.rows.mask = masked ? mask.get() : nullptr;
  P.rows.scale = &scale;
  P.inter_weight = kInter;
  P.intra_weight = kIntra;
  P.temperature = kTemperature;
  P.eps = kEps;
  P.of_rows = of_rows.as<DistRow>();
  P.columns = columns.as<T>();
  const int64_t chunks = cuda::dist_chunks(N, V);
  const Memory row_losses(N * sizeof(double)), column_losses(V * sizeof(double));
  const Memory parts(chunks * V * sizeof(ColumnMoments));
  const cuda::DistWorkspace workspace{row_losses.as<double>(), column_losses.as<double>(), parts.as<ColumnMoments>(),
                                      chunks};
  T loss = T(NAN);
  const T upstream = T(0.5);
  cudaError_t e = cuda::dist_forward(P, workspace, &loss, nullptr);
  P.rows.grad = grad.rows(kType);
  P.upstream = &upstream;
  if (!e) e = cuda::dist_backward(P, nullptr);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;

  const double rounding = kType == DType::kHalf       ? 1e-3
                          : kType == DType::kBFloat16 ? 8e-3
                          : sizeof(T) == 4            ? 4e-6
                                                      : 1e-12;
  double size = 0, worst = std::fabs(double(loss) - wanted) / wanted / (sizeof(T) == 4 ? 2e-6 : 1e-13);
  for (const std::vector<double>& row : exact) {
    for (double x : row) size = std::fmax(size, std::fabs(x));
  }
  size_t next = 0;
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t v = 0; v < V; ++v) {
      const double right = mask[n] ? exact[next][v] / 2 : 0;
      const double off = std::fabs(double(T(grad.at(n, v))) - right) / (mask[n] ? size * rounding : 1e-30);
      if (!(off <= worst)) worst = off;
    }
    next += mask[n];
  }
  if (!(worst < 1)) return std::printf("wrong: off by %g\n", worst), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 8) return std::puts("dist_main DTYPE N V INNER MASKED MODE SEED"), 2;
  const int64_t N = atoi(argument[2]), V = atoi(argument[3]), inner = atoi(argument[4]);
  const bool masked = atoi(argument[5]);
  cusim_order(atoi(argument[6]), unsigned(atoi(argument[7])));
  switch (atoi(argument[1])) {
    case 0:
      return run<float, __half, DType::kHalf>(N, V, inner, masked);
    case 1:
      return run<float, __nv_bfloat16, DType::kBFloat16>(N, V, inner, masked);
    case 2:
      return run<float, float, DType::kFloat>(N, V, inner, masked);
    default:
      return run<double, double, DType::kDouble>(N, V, inner, masked);
  }
}
