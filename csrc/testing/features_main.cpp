// The launches of the features schedule and of attention transfer as a program without torch, for the
// sanitizers.
//   features_main WHAT DTYPE MASKED MODE SEED  prints "right" or what is wrong
// WHAT 0 plain, 1 l2, 2 standardized, 3 cosine, of layers of every layout in one launch; 4 attention; 5, 6, 7 the first
// three of smooth L1;
// DTYPE 0 half, 1 bfloat16, 2 float, 3 double; MASKED 1: rows that do not count, NaN, and weights; MODE
// and SEED: the order of the threads. The truth is computed in double from the definitions, without any
// of the kernels' code: the gradient by differentiating what a row is divided by.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/attention_launch.h"
#include "cuda/features_plan.h"
#include "testing/memory.h"

extern "C" void cusim_order(int mode, unsigned seed);
extern "C" void cusim_device(int attribute, int value);

using namespace fastkd;

namespace {

template <class S>
double widened(S x) {
  return double(float(x));
}
double widened(double x) { return x; }

double uniform() {  // in -1 .. 1
  static uint64_t state = 7;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return double(state >> 40) / double(1 << 23) - 1;
}

// B x P rows of D features; the P rows of each B lie side by side where there are several.
struct Shape {
  int64_t B, D, P;
  int64_t N() const { return B * P; }
  int64_t at(int64_t row, int64_t d) const { return (row / P * D + d) * P + row % P; }
};

template <class S>
struct Features {
  Features(DType type, const Shape& shape)
      : shape(shape), type(type), memory(shape.N() * shape.D * int64_t(sizeof(S))), values(shape.N() * shape.D) {}
  void fill() {
    for (size_t i = 0; i < values.size(); ++i) {
      memory.as<S>()[i] = S(float(uniform()));
      values[i] = double(float(memory.as<S>()[i]));
    }
  }
  cuda::FeaturesTensor tensor() const {
    cuda::FeaturesTensor x{};
    x.data = memory.as<char>();
    x.dtype = type;
    x.element_size = sizeof(S);
    x.step = shape.P * int64_t(sizeof(S));
    x.stride[0] = shape.D * shape.P * int64_t(sizeof(S));
    x.stride[1] = sizeof(S);
    if (shape.B == 1) x.stride[0] = x.stride[1];
    return x;
  }
  std::vector<double> row(int64_t n) const {
    std::vector<double> x(shape.D);
    for (int64_t d = 0; d < shape.D; ++d) x[d] = values[shape.at(n, d)];
    return x;
  }
  double found(int64_t i) const { return widened(memory.as<S>()[i]); }
  Shape shape;
  DType type;
  Memory memory;
  std::vector<double> values;
};

template <class T>
void set_leading(cuda::FeaturesPart<T>& part, const Shape& shape) {
  part.N = shape.N();
  part.D = shape.D;
  for (const int64_t size : {shape.B, shape.P}) {
    if (size > 1) part.size[part.dims++] = size;
  }
  for (int d = 0; d < part.dims; ++d) part.inverse_size[d] = 1 / double(part.size[d]);
}

struct Error {
  double off = 0, size = 0;
  void add(double found, double right) {
    off += (found - right) * (found - right);
    size += right * right;
  }
  double relative() const { return std::sqrt(off / size); }
};

// x - m, divided by its length or deviation, and the derivative of sum_i u_i y_i for a given u.
struct Normal {
  Normal(Feature f, std::vector<double> x) : f(f), y(std::move(x)) {
    const double D = double(y.size());
    double mean = 0, squares = 0;
    for (const double v : y) mean += f == Feature::kStandardized ? v / D : 0;
    for (double& v : y) {
      v -= mean;
      squares += v * v;
    }
    if (f == Feature::kStandardized) divisor = std::sqrt(squares / D + 1e-6);
    if (f == Feature::kL2 || f == Feature::kCosine) divisor = std::sqrt(squares);
    for (double& v : y) v /= divisor;
  }
  std::vector<double> back(const std::vector<double>& u) const {
    const double D = double(y.size());
    double mean = 0, along = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      mean += u[i] / D;
      along += u[i] * y[i];
    }
    if (f == Feature::kStandardized) along /= D;
    std::vector<double> g(y.size());
    for (size_t i = 0; i < y.size(); ++i) {
      g[i] = f == Feature::kPlain ? u[i] : (u[i] - y[i] * along - (f == Feature::kStandardized ? mean : 0)) / divisor;
    }
    return g;
  }
  Feature f;
  std::vector<double> y;
  double divisor = 1;
};

constexpr double kBeta = 0.02;  // some differences are below, whether rows are normalised or not

// What a difference adds to the loss, and its slope.
struct Term {
  Term(double e, bool smooth_l1) : value(e * e), slope(2 * e) {
    if (!smooth_l1) return;
    const double size = std::fabs(e);
    value = size < kBeta ? e * e / 2 / kBeta : size - kBeta / 2;
    slope = size < kBeta ? e / kBeta : e / size;
  }
  double value, slope;
};

template <class S, class T>
int elements(Feature f, bool smooth_l1, DType type, bool masked, double tolerance) {
  const bool flat = f == Feature::kPlain && !masked;
  const std::vector<Shape> shapes{{9, 33, 1}, {2, 5003, 1}, {3, 64, 1}, {2, 8208, 1},
                                  {2, 7, 12}, {1, 40, 15},  {2, 7, 9},  {1, 300, 4}};
  std::vector<std::unique_ptr<Features<S>>> students, teachers, grads;
  std::vector<std::unique_ptr<Memory>> masks, weights;
  auto P = std::make_unique<cuda::FeaturesParams<T>>();
  cuda::Device device;
  if (cuda::current_device(device)) return std::puts("no device"), 1;
  cuda::FeaturesCounts counts{};
  cuda::FeaturesLosses<T> losses{};
  const int count = int(shapes.size());
  double right = 0;
  std::vector<std::vector<double>> exact;
  int64_t rows = 0;
  for (int l = 0; l < count; ++l) {
    const Shape& shape = shapes[l];
    for (auto* side : {&students, &teachers, &grads}) side->push_back(std::make_unique<Features<S>>(type, shape));
    Features<S>&s = *students[l], &t = *teachers[l];
    s.fill();
    t.fill();
    cuda::FeaturesPart<T>& part = P->layers[l];
    part.student = s.tensor();
    part.teacher = t.tensor();
    part.grad = grads[l]->tensor();
    masks.push_back(std::make_unique<Memory>(shape.N()));
    weights.push_back(std::make_unique<Memory>(shape.N() * int64_t(sizeof(T))));
    int64_t valid = 0;
    for (int64_t n = 0; n < shape.N(); ++n) {
      const bool here = !masked || n % 3 != 1;
      masks[l]->template as<bool>()[n] = here;
      weights[l]->template as<T>()[n] = T(masked ? 1 + uniform() / 2 : 1);
      valid += here;
      for (int64_t d = 0; !here && d < shape.D; ++d) s.memory.template as<S>()[shape.at(n, d)] = S(NAN);
    }
    if (flat) {
      cuda::plan_flat(part, shape.N() * shape.D);
    } else {
      set_leading(part, shape);
      cuda::plan_rows(part, normalized(f));
    }
    part.mask = masked ? masks[l]->template as<bool>() : nullptr;
    part.weight = masked ? weights[l]->template as<T>() : nullptr;
    part.layer_weight = losses.layer_weight[l] = 1.0 + l;
    part.scale = losses.scale[l] = 1 / (double(shape.D) * double(valid));
    part.first_row = rows;
    rows += shape.N();
    counts.mask[l] = part.mask;
    counts.N[l] = shape.N();
    counts.divisor[l] = double(shape.D);
    exact.emplace_back(shape.N() * shape.D);
    for (int64_t n = 0; n < shape.N(); ++n) {
      if (!masks[l]->template as<bool>()[n]) continue;
      const Normal x(f, s.row(n)), y(f, t.row(n));
      const double w = double(weights[l]->template as<T>()[n]) * part.scale * part.layer_weight;
      const double share = f == Feature::kCosine ? 0.5 : 1;
      std::vector<double> u(shape.D);
      for (int64_t d = 0; d < shape.D; ++d) {
        const double e = x.y[d] - y.y[d];
        const Term term(e, smooth_l1);
        right += share * w * term.value;
        u[d] = share * w * term.slope;
      }
      const std::vector<double> g = x.back(u);
      for (int64_t d = 0; d < shape.D; ++d) exact[l][shape.at(n, d)] = g[d];
    }
  }
  P->count = counts.count = losses.count = count;
  P->feature = f;
  P->of_smooth_l1 = smooth_l1;
  P->smooth_l1 = SmoothL1<T>(kBeta);
  const cuda::FeaturesGrid grid = cuda::plan_blocks(P->layers, count, device);
  P->state_rows = grid.rows;
  P->room = grid.room;
  const Memory scales(count * 8), partials(grid.blocks * 8), row_loss(rows * int64_t(sizeof(T))), total(8);
  const Memory layers(count * int64_t(sizeof(T))), loss(sizeof(T));
  counts.scales = scales.as<double>();
  if (masked) P->scales = losses.scales = counts.scales;
  if (masked) P->row_loss = row_loss.as<T>();
  P->partials = partials.as<double>();
  for (int l = 0; l < count; ++l) losses.first_block[l] = P->layers[l].first_block;
  losses.first_block[count] = int32_t(grid.blocks);
  losses.partials = P->partials;
  losses.total = total.as<double>();
  losses.first = true;
  losses.layers = layers.as<T>();
  losses.loss = loss.as<T>();
  cudaError_t e = masked ? cuda::features_count(counts, nullptr) : cudaSuccess;
  if (!e) e = cuda::features(*P, grid.blocks, nullptr);
  if (!e) e = cuda::features_finish(losses, nullptr);
  if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;
  double worst = 0;
  for (int l = 0; l < count; ++l) {
    Error error;
    for (size_t i = 0; i < exact[l].size(); ++i) error.add(grads[l]->found(int64_t(i)), exact[l][i]);
    worst = std::fmax(worst, error.relative());
    if (std::isnan(error.relative())) worst = error.relative();
  }
  const double wrong_loss = std::fabs(double(*loss.as<T>()) - right) / right;
  if (!(wrong_loss < 2e-6 && worst < tolerance)) return std::printf("wrong: off by %g, %g\n", wrong_loss, worst), 1;
  return std::puts("right"), 0;
}

template <class S, class T>
int attention(DType type, double tolerance) {
  constexpr double kP = 3;
  for (const Shape& shape : {Shape{2, 7, 12}, Shape{1, 40, 15}, Shape{3, 600, 4}}) {
    const Shape teacher_shape{shape.B, 5, shape.P};
    Features<S> student(type, shape), teacher(type, teacher_shape), grad(type, shape);
    student.fill();
    teacher.fill();
    cuda::Device device;
    if (cuda::current_device(device)) return std::puts("no device"), 1;
    const int64_t rows = shape.N();
    const Memory maps(2 * rows * 8), losses(shape.B * 8);
    const auto part = [&](const Features<S>& x, const Features<S>* out) {
      cuda::FeaturesPart<T> p{};
      p.student = x.tensor();
      if (out) p.grad = out->tensor();
      set_leading(p, x.shape);
      cuda::plan_rows(p, false);
      return p;
    };
    double* map = maps.as<double>();
    cuda::AttentionPowers<T> powers{{part(student, nullptr), part(teacher, nullptr)}, {map, map + rows}, kP, 0};
    const cuda::FeaturesGrid grid = cuda::plan_blocks(powers.sides, 2, device);
    powers.room = grid.room;
    const double all = double(rows);
    const cuda::AttentionMaps<T> compare{
        shape.P, map, map + rows, true, kP / double(shape.D) / all, nullptr, losses.as<double>()};
    cuda::AttentionSlopes<T> slopes{part(student, &grad), map, map + rows, kP};
    const cuda::FeaturesGrid last = cuda::plan_blocks(&slopes.layer, 1, device);
    cudaError_t e = cuda::attention_powers(powers, grid.blocks, nullptr);
    if (!e) e = cuda::attention_maps(compare, shape.B, nullptr);
    if (!e) e = cuda::attention_slopes(slopes, last.blocks, nullptr);
    if (e) return std::printf("error: %s\n", cudaGetErrorString(e)), 1;
    Error error;
    double right = 0, found = 0;
    for (int64_t b = 0; b < shape.B; ++b) {
      found += losses.as<double>()[b];
      const auto normal = [&](const Features<S>& x) {
        std::vector<double> sums(shape.P);
        for (int64_t i = 0; i < shape.P; ++i) {
          for (const double v : x.row(b * shape.P + i)) sums[i] += std::pow(std::fabs(v), kP) / double(x.shape.D);
        }
        return Normal(Feature::kL2, sums);
      };
      const Normal x = normal(student), y = normal(teacher);
      std::vector<double> u(shape.P);
      for (int64_t i = 0; i < shape.P; ++i) {
        right += (x.y[i] - y.y[i]) * (x.y[i] - y.y[i]);
        u[i] = 2 * (x.y[i] - y.y[i]) / all;
      }
      const std::vector<double> of_map = x.back(u);
      for (int64_t i = 0; i < shape.P; ++i) {
        for (int64_t d = 0; d < shape.D; ++d) {
          const int64_t at = shape.at(b * shape.P + i, d);
          const double v = student.values[at];
          error.add(grad.found(at), of_map[i] * kP / double(shape.D) * v * std::fabs(v));
        }
      }
    }
    const double wrong_loss = std::fabs(found - right) / right, wrong = error.relative();
    if (!(wrong_loss < 2e-6 && wrong < tolerance)) return std::printf("wrong: off by %g, %g\n", wrong_loss, wrong), 1;
  }
  return std::puts("right"), 0;
}

template <class S, class T>
int run(int what, DType type, bool masked, double tolerance) {
  if (what == 4) return attention<S, T>(type, tolerance);
  return elements<S, T>(Feature(what % 5), what > 4, type, masked, tolerance);
}

}  // namespace

int main(int count, char** argument) {
  if (count != 6) return std::puts("features_main WHAT DTYPE MASKED MODE SEED"), 2;
  const auto number = [&](int i) { return atoi(argument[i]); };
  cusim_device(int(cudaDevAttrMultiProcessorCount), 1);
  cusim_order(number(4), unsigned(number(5)));
  const int what = number(1);
  const bool masked = number(3) != 0;
  switch (number(2)) {
    case 0:
      return run<__half, float>(what, DType::kHalf, masked, 2e-2);  // small gradients are of few digits
    case 1:
      return run<__nv_bfloat16, float>(what, DType::kBFloat16, masked, 4e-3);
    case 2:
      return run<float, float>(what, DType::kFloat, masked, 5e-6);
    default:
      return run<double, double>(what, DType::kDouble, masked, 1e-12);
  }
}
