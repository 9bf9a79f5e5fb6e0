// The launches of the rows schedule as a program without torch, for the sanitizers.
//   rows_main DIVERGENCE DTYPE N V INNER CLUSTERS TARGETS MODE SEED  prints "right" or what is wrong
// INNER: how many rows lie side by side, in runs of that length; 1: none do.
// DTYPE 0 half, 1 bfloat16, 2 float; CLUSTERS 0: a GPU of before clusters; TARGETS 1: rows have a hard loss too; of
// NonTargetKL, 2: a decoupled loss, 3: a normalized one; MODE and SEED: the order of the threads. The truth is computed
// in double from the formulas, without any of the kernels' code.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/rows_launch.h"
#include "cuda/rows_plan.h"
#include "testing/matrix.h"

extern "C" void cusim_order(int mode, unsigned seed);
extern "C" void cusim_device(int attribute, int value);

using namespace fastkd;

namespace {

constexpr double kBeta = 0.3, kPower = 0.5, kTemperature = 2.0, kHard = 0.3, kSoft = 0.6, kSmoothing = 0.1, kCoin = 1.5;

// The standard library's generators are templates, which the linker would share with cusim's.
struct Normal {
  uint64_t state = 7;
  float operator()() {  // nearly: of twelve uniform numbers
    float sum = -6;
    for (int i = 0; i < 12; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += float(state >> 40) / float(1 << 24);
    }
    return 2 * sum;
  }
};

std::vector<double> log_softmax(const std::vector<double>& logits, double temperature = kTemperature) {
  double max = -INFINITY, sum = 0;
  for (double x : logits) max = std::fmax(max, x / temperature);
  for (double x : logits) sum += std::exp(x / temperature - max);
  std::vector<double> out;
  for (double x : logits) out.push_back(x / temperature - max - std::log(sum));
  return out;
}

// The same where every class is a coin, whose gradient is that of each by itself.
double truth_of_coins(const std::vector<double>& s, const std::vector<double>& t, std::vector<double>& grad) {
  double loss = 0;
  for (size_t v = 0; v < s.size(); ++v) {
    const double a = s[v] / kTemperature, b = t[v] / kTemperature;
    const double p = 1 / (1 + std::exp(-a)), q = 1 / (1 + std::exp(-b));
    // log p = -log(1 + e^-a), log(1 - p) = -log(1 + e^a)
    loss += q * (std::log1p(std::exp(-a)) - std::log1p(std::exp(-b)));
    loss += (1 - q) * (std::log1p(std::exp(a)) - std::log1p(std::exp(b)));
    grad.push_back((p - q) * kTemperature);
  }
  return loss * kTemperature * kTemperature;
}

// The row's divergence times T^2, and the gradient with respect to the student.
double truth(Divergence which, const std::vector<double>& s, const std::vector<double>& t, std::vector<double>& grad) {
  if (which == Divergence::kBernoulliKL) return truth_of_coins(s, t, grad);
  const std::vector<double> log_p = log_softmax(s), log_q = log_softmax(t);
  constexpr double kSum = kBeta + kPower;  // of the alpha-beta divergence, whose alpha is kBeta and beta kPower
  double loss = 0, slopes = 0, accepted = 0;
  std::vector<double> slope;
  for (size_t v = 0; v < s.size(); ++v) {
    const double p = std::exp(log_p[v]), q = std::exp(log_q[v]), m = kBeta * q + (1 - kBeta) * p;
    switch (which) {
      case Divergence::kForwardKL:
      case Divergence::kNonTargetKL:
        loss += q * (log_q[v] - log_p[v]);
        slope.push_back(-q);
        break;
      case Divergence::kSoftCrossEntropy:
        loss -= q * log_p[v];
        slope.push_back(-q);
        break;
      case Divergence::kNegativeLogAcceptance:
        accepted += std::fmin(p, q);
        slope.push_back(p < q ? -p : 0);
        break;
      case Divergence::kAlphaBeta: {
        const double both = std::pow(q, kBeta) * std::pow(p, kPower);
        loss -= (both - kBeta / kSum * std::pow(q, kSum) - kPower / kSum * std::pow(p, kSum)) / (kBeta * kPower);
        slope.push_back((std::pow(p, kSum) - both) / kBeta);
        break;
      }
      default:
        loss += kBeta * q * (log_q[v] - std::log(m)) + (1 - kBeta) * p * (log_p[v] - std::log(m));
        slope.push_back((1 - kBeta) * p * (log_p[v] - std::log(m)));
    }
    slopes += slope.back();
  }
  if (which == Divergence::kNegativeLogAcceptance) {  // of the logarithm of the sum
    loss = -std::log(accepted);
    slopes /= accepted;
    for (double& x : slope) x /= accepted;
  }
  for (size_t v = 0; v < s.size(); ++v) grad.push_back((slope[v] - std::exp(log_p[v]) * slopes) * kTemperature);
  return loss * kTemperature * kTemperature;
}

// With the cross-entropy beside it.
double with_target(double soft, const std::vector<double>& s, size_t target, std::vector<double>& grad) {
  const std::vector<double> log_p = log_softmax(s, 1);
  double loss = -(1 - kSmoothing) * log_p[target];
  for (size_t v = 0; v < s.size(); ++v) {
    const double wanted = kSmoothing / double(s.size()) + (v == target ? 1 - kSmoothing : 0);
    loss -= kSmoothing / double(s.size()) * log_p[v];
    grad[v] = kSoft * grad[v] + kHard * (std::exp(log_p[v]) - wanted);
  }
  return kSoft * soft + kHard * loss;
}

// With a target that is parted from the other classes, of which kBeta times the divergence counts.
double with_parted_target(const std::vector<double>& s, const std::vector<double>& t, size_t target, bool decoupled,
                          std::vector<double>& grad) {
  std::vector<double> others_s = s, others_t = t;
  others_s.erase(others_s.begin() + long(target));
  others_t.erase(others_t.begin() + long(target));
  double loss = kBeta * truth(Divergence::kNonTargetKL, others_s, others_t, grad);
  if (!decoupled) {  // the cross-entropy in its place: the teacher's entropy comes to it
    for (double x : log_softmax(others_t)) loss -= kBeta * kTemperature * kTemperature * std::exp(x) * x;
  }
  for (double& x : grad) x *= kBeta;
  grad.insert(grad.begin() + long(target), 0);
  const double at = decoupled ? kTemperature : 1;
  const std::vector<double> log_p = log_softmax(s, at), log_q = log_softmax(t, at);
  const double q = std::exp(log_q[target]);
  double rest_p = 0, rest_q = 0;
  for (size_t v = 0; v < s.size(); ++v) {
    if (v == target) continue;
    rest_p += std::exp(log_p[v]);
    rest_q += std::exp(log_q[v]);
  }
  const double scale = decoupled ? kCoin * at * at : 1;
  if (decoupled) {
    loss += scale * (q * (log_q[target] - log_p[target]) + rest_q * std::log(rest_q / rest_p));
  } else {
    loss -= q * log_p[target];
  }
  for (size_t v = 0; v < s.size(); ++v) {
    const double p_v = std::exp(log_p[v]);
    grad[v] += decoupled ? scale / at * (p_v - (v == target ? q : rest_q * p_v / rest_p)) : q * (p_v - (v == target));
  }
  return loss;
}

template <Divergence kWhich>
cudaError_t forward_backward(const RowsParams<float>& P, const cuda::Device& device, void* workspace,
                             const RowsParams<float>& back, const RowsParams<float>& phases) {
  if (const cudaError_t e = cuda::rows_forward<kWhich>(P, device, workspace, nullptr)) return e;
  if (const cudaError_t e = cuda::rows_backward<kWhich>(back, device, nullptr)) return e;
  if (!phases.sums) return cudaSuccess;
  if (const cudaError_t e = cuda::rows_statistics(phases, device, workspace, nullptr)) return e;
  return cuda::rows_sums<kWhich>(phases, device, workspace, nullptr);
}

// One divergence of each kind: centred, with the teacher's entropy, not centred and with other functors at its ends,
// between the classes beside a target, of two sums, given logarithms and two parameters, given log odds. The kernels of
// the others take the same ways.
cudaError_t forward_backward(const RowsParams<float>& P, const cuda::Device& device, void* workspace,
                             const RowsParams<float>& back, const RowsParams<float>& phases) {
  switch (P.divergence) {
    case Divergence::kForwardKL:
      return forward_backward<Divergence::kForwardKL>(P, device, workspace, back, phases);
    case Divergence::kSoftCrossEntropy:
      return forward_backward<Divergence::kSoftCrossEntropy>(P, device, workspace, back, phases);
    case Divergence::kJensenShannon:
      return forward_backward<Divergence::kJensenShannon>(P, device, workspace, back, phases);
    case Divergence::kNonTargetKL:
      return forward_backward<Divergence::kNonTargetKL>(P, device, workspace, back, phases);
    case Divergence::kNegativeLogAcceptance:
      return forward_backward<Divergence::kNegativeLogAcceptance>(P, device, workspace, back, phases);
    case Divergence::kAlphaBeta:
      return forward_backward<Divergence::kAlphaBeta>(P, device, workspace, back, phases);
    case Divergence::kBernoulliKL:
      return forward_backward<Divergence::kBernoulliKL>(P, device, workspace, back, phases);
    default:
      return cudaErrorInvalidValue;
  }
}

// Whether the second phase by itself writes the gradient: the slopes of a row add up to 0.
bool in_two_phases(Divergence which) {
  return which == Divergence::kForwardKL || which == Divergence::kSoftCrossEntropy || which == Divergence::kBernoulliKL;
}

// The row's divergence times T^2, from what the phases by themselves have found of it.
double of_sums(Divergence which, const RowSums& sums, const RowsStats& stats) {
  double loss = sums.loss;
  if (which == Divergence::kNegativeLogAcceptance) loss = -std::log(sums.second);
  if (which == Divergence::kSoftCrossEntropy) loss += std::log(stats.sum_teacher);
  return loss * kTemperature * kTemperature;
}

template <class S, DType kType>
int run(Divergence which, int64_t N, int64_t V, int64_t inner, int targets) {
  Matrix<S> student(N, V, inner), teacher(N, V, inner), grad(N, V, inner), again(N, V, inner), of_phases(N, V, inner);
  Normal normal;
  for (int64_t i = 0; i < N * V; ++i) {
    student.data[i] = S(normal());
    teacher.data[i] = S(normal());
    grad.data[i] = again.data[i] = of_phases.data[i] = S(NAN);
  }
  const std::unique_ptr<bool[]> mask(new bool[N]);
  for (int64_t n = 0; n < N; ++n) mask[n] = n != 1;
  std::vector<int64_t> target(N);
  for (int64_t n = 0; n < N; ++n) target[n] = n == 1 ? -100 : n % 2 ? V - 1 - n % V : 7 * n % V;
  std::vector<float> loss(N, NAN);
  std::vector<RowsStats> stats(N), found(N);
  std::vector<RowSums> sums(N);
  cuda::Device device;
  if (cuda::current_device(device)) return std::puts("no device"), 1;
  double scale = NAN;
  float sum = NAN;
  if (cuda::rows_scale<float>({mask.get(), N, nullptr, 1.0, true, &scale}, nullptr))
    return std::puts(cudaGetErrorString(cudaGetLastError())), 1;

  RowsParams<float> P{};
  P.divergence = which;
  const bool two_powers = which == Divergence::kAlphaBeta;
  const bool one_number = which == Divergence::kJensenShannon || which == Divergence::kNonTargetKL;
  P.parameter.of_all = one_number || two_powers ? kBeta : 0;
  P.second_parameter.of_all = two_powers ? kPower : kCoin;
  P.N = N;
  P.V = V;
  P.student = student.rows(kType);
  P.teacher = teacher.rows(kType);
  P.grad = grad.rows(kType);
  P.temperature.of_all = P.teacher_temperature.of_all = kTemperature;
  P.t_squared = true;
  P.mask = mask.get();
  if (targets == 1) P.hard = {target.data(), TargetLoss::kCrossEntropy, kHard, kSoft, kSmoothing};
  if (targets > 1) P.hard = {target.data(), targets == 2 ? TargetLoss::kDecoupled : TargetLoss::kNormalized, 1, 1, 0};
  P.hard.classes = double(V);
  P.scale = &scale;
  P.loss = loss.data();
  P.stats = stats.data();
  RowsParams<float> back = P;
  back.grad = again.rows(kType);
  RowsParams<float> phases = P;  // by themselves
  phases.grad = of_phases.rows(kType);
  phases.stats = found.data();
  phases.sums = targets > 1 ? nullptr : sums.data();
  const cuda::RowsPlan plan = cuda::rows_plan(P, device);
  const int splits = std::max(plan.on_chip ? 0 : plan.splits, cuda::rows_phase_plan(P, device).splits);
  std::vector<float> workspace(cuda::kPartValues * N * splits);
  cudaError_t e = forward_backward(P, device, workspace.data(), back, phases);
  if (!e) e = cuda::rows_sum<float>(loss.data(), N, 0, &scale, &sum, nullptr);
  const float factor = 0.5f;
  cuda::Scale<float> scaled{};
  scaled.count = 1;
  scaled.parts[0] = {reinterpret_cast<char*>(again.data), N * V, kType, int32_t(sizeof(*again.data)), 0};
  scaled.factor = &factor;
  if (!e) e = cuda::scale(scaled, device, nullptr);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;

  double worst = 0, total = 0, counted = 0;
  const double rounding = kType == DType::kFloat ? 1e-6 : kType == DType::kHalf ? 1e-3 : 8e-3;
  for (int64_t n = 0; n < N; ++n) {
    std::vector<double> s, t, exact;
    for (int64_t v = 0; v < V; ++v) {
      s.push_back(float(student.at(n, v)));
      t.push_back(float(teacher.at(n, v)));
    }
    double row = 0;
    if (mask[n]) {
      row = targets > 1 ? with_parted_target(s, t, size_t(target[n]), targets == 2, exact) : truth(which, s, t, exact);
      if (targets <= 1 && std::fabs(of_sums(which, sums[n], found[n]) - row) > 4e-6 * std::fmax(row, 1)) {
        worst = INFINITY;
      }
      if (targets == 1) row = with_target(row, s, size_t(target[n]), exact);
    } else if (targets <= 1 && (sums[n].loss != 0 || found[n].sum_student != 0)) {
      worst = INFINITY;
    }
    if (std::fabs(loss[n] - row) > 4e-6 * std::fmax(row, 1)) worst = INFINITY;
    total += row;
    counted += mask[n];
    double size = 1e-30;
    for (double x : exact) size = std::fmax(size, std::fabs(x));
    for (int64_t v = 0; v < V; ++v) {
      const double right = mask[n] ? exact[v] * scale : 0, unit = size * scale;
      const double third = in_two_phases(which) && targets <= 1 ? double(float(of_phases.at(n, v))) : right;
      for (const auto& [value, wanted] : {std::pair<double, double>{float(grad.at(n, v)), right},
                                          {float(again.at(n, v)), right / 2},
                                          {third, right}}) {
        const double off = std::fabs(value - wanted) / (mask[n] ? unit : 1e-30) / rounding;
        if (!(off <= worst)) worst = off;
      }
    }
  }
  if (!(std::fabs(sum - total / counted) <= 4e-6 * std::fmax(total / counted, 1))) worst = INFINITY;
  if (!(worst < 4)) return std::printf("wrong: off by %g\n", worst), 1;
  return std::puts("right"), 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count != 10) return std::puts("rows_main DIVERGENCE DTYPE N V INNER CLUSTERS TARGETS MODE SEED"), 2;
  const auto which = Divergence(atoi(argument[1]));
  const int64_t N = atoi(argument[3]), V = atoi(argument[4]), inner = atoi(argument[5]);
  if (!atoi(argument[6])) {
    cusim_device(int(cudaDevAttrComputeCapabilityMajor), 8);
    cusim_device(int(cudaDevAttrMaxSharedMemoryPerBlockOptin), 48 << 10);
  }
  const int targets = atoi(argument[7]);
  cusim_order(atoi(argument[8]), unsigned(atoi(argument[9])));
  switch (atoi(argument[2])) {
    case 0:
      return run<__half, DType::kHalf>(which, N, V, inner, targets);
    case 1:
      return run<__nv_bfloat16, DType::kBFloat16>(which, N, V, inner, targets);
    default:
      return run<float, DType::kFloat>(which, N, V, inner, targets);
  }
}
