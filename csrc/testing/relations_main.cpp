// The launches of the pairs and the angles schedule as a program without torch, for the sanitizers.
//   relations_main SCHEDULE DTYPE N D ALIKE BLOCK MULTIPROCESSORS COUNT WEIGHTED MODE SEED
// prints "right" or what is wrong.
// SCHEDULE pairs or angles; DTYPE 0 half, 1 bfloat16, 2 float, 3 double; ALIKE 1: some rows are alike,
// and some nearly; BLOCK: rows of a block of triples; COUNT: rows that are there, as the device is told
// it, or -1; WEIGHTED 1: the rows of pairs have weights; MODE and SEED: the order of the threads. The truth
// is computed in double from the formulas, without any of the kernels' code.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/angles_launch.h"
#include "cuda/pairs_launch.h"
#include "testing/memory.h"

extern "C" void cusim_order(int mode, unsigned seed);
extern "C" void cusim_device(int attribute, int value);

using namespace fastkd;

namespace {

constexpr double kDelta = 0.4;

// Embeddings whose columns lie N elements apart, and their values.
struct Side {
  template <class S>
  Side(S, DType type, int64_t N, int64_t D, bool alike, uint64_t seed)
      : D(D), memory(N * D * int64_t(sizeof(S))), values(N * D), state(seed) {
    S* data = static_cast<S*>(memory.data);
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t d = 0; d < D; ++d) {
        // every tenth row is the one before, and every other fifth nearly
        const bool like = alike && n % 5 == 4;
        const double x = like ? at(n - 1)[d] + (n % 10 == 4 ? 0.01 * uniform() : 0) : uniform();
        data[d * N + n] = S(float(x));
        values[n * D + d] = double(float(data[d * N + n]));
      }
    }
    source = {static_cast<const char*>(memory.data), type, int32_t(sizeof(S)), D, 1, N};
  }
  double uniform() {  // in -1 .. 1
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(state >> 40) / double(1 << 23) - 1;
  }
  const double* at(int64_t n) const { return values.data() + n * D; }
  // x_j - x_i, and its length
  double difference(int64_t i, int64_t j, std::vector<double>& out) const {
    double squared = 0;
    out.resize(D);
    for (int64_t d = 0; d < D; ++d) {
      out[d] = at(j)[d] - at(i)[d];
      squared += out[d] * out[d];
    }
    return std::sqrt(squared);
  }
  int64_t D;
  Memory memory;
  std::vector<double> values;
  uint64_t state;
  Embeddings source;
};

double clamp(double e) { return std::fmin(std::fmax(e, -kDelta), kDelta); }
double huber(double e) { return clamp(e) * (e - clamp(e) / 2); }

double row_weight(int64_t i) { return double(i % 7) / 4; }

double pairs_truth(const Side& x, const Side& y, int64_t N, bool weighted, std::vector<double>& grad) {
  if (N < 2) return 0;
  std::vector<double> s(N * N), t(N * N), difference;
  double mu = 0, tau = 0, loss = 0, C = 0;
  const double pairs = double(N) * double(N - 1);
  for (int64_t i = 0; i < N * N; ++i) {
    if (i / N == i % N) continue;
    s[i] = std::fmax(x.difference(i / N, i % N, difference), 1e-6);
    t[i] = std::fmax(y.difference(i / N, i % N, difference), 1e-6);
    mu += s[i] / pairs;
    tau += t[i] / pairs;
  }
  const auto e = [&](int64_t i) { return s[i] / mu - t[i] / tau; };
  const auto weight = [&](int64_t i) { return weighted ? (row_weight(i / N) + row_weight(i % N)) / 2 : 1; };
  for (int64_t i = 0; i < N * N; ++i) {
    loss += weight(i) * huber(e(i));
    C += weight(i) * clamp(e(i)) * s[i] / mu / pairs;
  }
  for (int64_t i = 0; i < N * N; ++i) {
    if (s[i] <= 1e-6) continue;
    const double w = 2 / (double(N) * double(N) * mu) * (weight(i) * clamp(e(i)) - C) / s[i];
    x.difference(i / N, i % N, difference);
    for (int64_t d = 0; d < x.D; ++d) grad[i / N * x.D + d] -= w * difference[d];
  }
  return loss / (double(N) * double(N));
}

// Unit vectors [N, D] from row a to all rows; 1 / length.
void units(const Side& x, int64_t a, int64_t N, std::vector<double>& u, std::vector<double>& q) {
  std::vector<double> difference;
  for (int64_t i = 0; i < N; ++i) {
    const double length = x.difference(a, i, difference);
    q[i] = length == 0 ? 0 : 1 / length;
    for (int64_t d = 0; d < x.D; ++d) u[i * x.D + d] = difference[d] * q[i];
  }
}
double dot(const double* a, const double* b, int64_t D) {
  double sum = 0;
  for (int64_t d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
}

double angles_truth(const Side& x, const Side& y, int64_t N, std::vector<double>& grad) {
  if (N < 2) return 0;
  std::vector<double> u(N * x.D), v(N * y.D), q(N), unused(N), slope(x.D);
  double loss = 0;
  const double cube = double(N) * double(N) * double(N);
  for (int64_t a = 0; a < N; ++a) {
    units(x, a, N, u, q);
    units(y, a, N, v, unused);
    for (int64_t i = 0; i < N; ++i) {
      const double* own = &u[i * x.D];
      std::fill(slope.begin(), slope.end(), 0);
      for (int64_t k = 0; k < N; ++k) {
        const double e = dot(own, &u[k * x.D], x.D) - dot(&v[i * y.D], &v[k * y.D], y.D), r = clamp(e);
        loss += huber(e);
        for (int64_t d = 0; d < x.D; ++d) slope[d] += 2 * r * u[k * x.D + d];
      }
      const double along = dot(slope.data(), own, x.D);
      for (int64_t d = 0; d < x.D; ++d) {
        const double part = (slope[d] - along * own[d]) * q[i] / cube;
        grad[i * x.D + d] += part;
        grad[a * x.D + d] -= part;
      }
    }
  }
  return loss / cube;
}

struct Problem {
  bool pairs;
  int64_t N, D;
  bool alike;
  int block;
  int64_t count;  // negative: the device is not told
  bool weighted;

  int64_t there() const { return count < 0 ? N : count; }
};

// What the device is told of the rows.
template <class T>
struct Told {
  explicit Told(const Problem& p) : count_memory(sizeof(int64_t)), weight_memory(p.N * int64_t(sizeof(T))) {
    *count_memory.as<int64_t>() = p.count;
    for (int64_t i = 0; i < p.N; ++i) weight_memory.as<T>()[i] = T(row_weight(i));
    if (p.count >= 0) count = count_memory.as<int64_t>();
    if (p.weighted) weight = weight_memory.as<T>();
  }
  Memory count_memory, weight_memory;
  const int64_t* count = nullptr;  // []
  const T* weight = nullptr;       // [N]
};

template <class T, cuda::PairsStorage kStorage>
cudaError_t run_pairs(const Problem& p, const Side& x, const Side& y, const cuda::Device& device, T* loss, T* grad) {
  cuda::PairsParams P{};
  P.options = {kDelta, true, p.N};
  P.weight = 1;
  const Told<T> told(p);
  P.count = told.count;
  P.row_weights = told.weight;
  P.student.source = x.source;
  P.teacher.source = y.source;
  P.loss = loss;
  P.grad = grad;
  P.grad_dtype = sizeof(T) == 8 ? DType::kDouble : DType::kFloat;
  P.grad_element_size = sizeof(T);
  const Memory workspace(cuda::pairs_plan(P, kStorage, device, nullptr));
  cuda::pairs_plan(P, kStorage, device, static_cast<char*>(workspace.data));
  return cuda::pairs_run<kStorage, Relation::kRkdDistance>(P, device, nullptr);
}

template <class T>
cudaError_t run_angles(const Problem& p, const Side& x, const Side& y, const cuda::Device& device, T* loss, T* grad) {
  const Told<T> told(p);
  cuda::AnglesParams<T> P{x.source, y.source, p.N, told.count, kDelta, 1, p.block, loss, grad};
  const Memory workspace(cuda::angles_workspace_bytes(P, device));
  return cuda::angles_forward(P, device, workspace.data, nullptr);
}

template <class S, class T, cuda::PairsStorage kStorage>
int run(const Problem& p, DType type, double tolerance) {
  const Side x(S(), type, p.N, p.D, p.alike, 7), y(S(), type, p.N, p.D + 1, p.alike, 8);
  const int64_t elements = p.N * p.D;
  const Memory loss(sizeof(T)), grad(elements * int64_t(sizeof(T)));
  T *found_loss = static_cast<T*>(loss.data), *found = static_cast<T*>(grad.data);
  cuda::Device device;
  if (cuda::current_device(device)) return std::puts("no device"), 1;
  const cudaError_t e = p.pairs ? run_pairs<T, kStorage>(p, x, y, device, found_loss, found)
                                : run_angles<T>(p, x, y, device, found_loss, found);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;
  std::vector<double> exact(elements);
  const double right = p.pairs ? pairs_truth(x, y, p.there(), p.weighted, exact) : angles_truth(x, y, p.there(), exact);
  double off = 0, size = 0;
  for (int64_t i = 0; i < elements; ++i) {
    off += (double(found[i]) - exact[i]) * (double(found[i]) - exact[i]);
    size += exact[i] * exact[i];
    if (i >= p.there() * p.D && found[i] != 0) return std::puts("a row that is not there has a gradient"), 1;
  }
  const double wrong_loss = std::fabs(double(*found_loss) - right) / right, wrong = std::sqrt(off / size);
  const bool nothing = right == 0 && size == 0 && *found_loss == 0 && off == 0;
  if (!nothing && !(wrong_loss < 2e-6 && wrong < tolerance))
    return std::printf("wrong: off by %g, %g\n", wrong_loss, wrong), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 12) {
    return std::puts("relations_main SCHEDULE DTYPE N D ALIKE BLOCK MULTIPROCESSORS COUNT WEIGHTED MODE SEED"), 2;
  }
  const auto number = [&](int i) { return atoi(argument[i]); };
  const Problem p{
      std::string(argument[1]) == "pairs", number(3), number(4), number(5) != 0, number(6), number(8), number(9) != 0};
  cusim_device(int(cudaDevAttrMultiProcessorCount), number(7));
  cusim_order(number(10), unsigned(number(11)));
  // triples are computed from the given values; pairs round their weights to what the tiles hold
  switch (number(2)) {
    case 0:
      return run<__half, float, cuda::PairsStorage::kHalf>(p, DType::kHalf, p.pairs ? 5e-4 : 5e-6);
    case 1:
      return run<__nv_bfloat16, float, cuda::PairsStorage::kBFloat16>(p, DType::kBFloat16, p.pairs ? 5e-3 : 5e-6);
    case 2:
      return run<float, float, cuda::PairsStorage::kFloat>(p, DType::kFloat, 5e-6);
    default:
      return run<double, double, cuda::PairsStorage::kDouble>(p, DType::kDouble, 1e-12);
  }
}
