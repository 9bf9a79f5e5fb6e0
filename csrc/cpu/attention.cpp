// Attention transfer on the CPU, of maps [B, C, H, W] of student and teacher:
//
//   A = 1/C sum_c |x_c|^p, f = A / max(|A|, 1e-12) over H W; loss = 1/(B H W) sum (f_s - f_t)^2
//   grad = 2 / (B H W) a_s (e - f_s sum f_s e) p / C |x|^(p - 1) sign x,  e = f_s - f_t
//
// A sample's maps are walked for the sums, and the student's once more, from cache, for the gradient.
// Traffic: student + teacher + gradient, once each, where a sample's student fits the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/attention_inputs.h"
#include "cpu/attention_kernel.h"
#include "cpu/isa.h"
#include "cpu/pages.h"

namespace fastkd {
namespace {

template <class T>
const AttentionKernel<T>& kernel() {
  return FASTKD_OF_ISA(attention_kernel<T>());
}

constexpr int64_t kLargeBytes = int64_t(16)
                                << 20;     // of a gradient that goes past the caches, its pages fetched beforehand
constexpr int64_t kPositionsAtOnce = 256;  // that are worth a thread, where samples are few

template <class T>
class Attention {
 public:
  Attention(const AttentionInputs& in, const Tensor* grad)
      : p_(in.p),
        B_(in.B()),
        positions_(in.positions()),
        C_(in.student.size(1)),
        teacher_C_(in.teacher.size(1)),
        student_(positions_tensor(in.student, const_cast<void*>(in.student.const_data_ptr()), "student")),
        teacher_(positions_tensor(in.teacher, const_cast<void*>(in.teacher.const_data_ptr()), "teacher")) {
    if (!grad) return;
    grad_ = positions_tensor(*grad, grad->mutable_data_ptr(), "grad");
    stream_ = grad->numel() * int64_t(grad->element_size()) > kLargeBytes;
  }

  double run(double upstream) const {
    if (B_ == 0 || positions_ == 0) return 0;
    std::vector<double> losses(B_);
    const bool enough = B_ >= 2 * int64_t(torch::stable::get_num_threads());
    const auto samples = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) losses[b] = sample(b, upstream, !enough);
    };
    if (enough) {
      torch::stable::parallel_for(0, B_, 1, samples);
    } else {
      samples(0, B_);
    }
    double sum = 0;
    for (const double x : losses) sum += x;
    return sum / (double(B_) * double(positions_));
  }

 private:
  template <class F>
  void positions(bool share, F&& f) const {
    if (share) {
      torch::stable::parallel_for(0, positions_, kPositionsAtOnce, f);
    } else {
      f(0, positions_);
    }
  }

  template <class S>
  void sums(const RowsTensor& x, int64_t C, int64_t b, bool share, std::vector<double>& map) const {
    positions(share, [&](int64_t begin, int64_t end) {
      kernel<S>().powers(x, C, p_, b * positions_ + begin, b * positions_ + end, map.data() + begin);
    });
    for (double& v : map) v /= double(C);
  }

  static double squares(const std::vector<double>& map) {
    double sum = 0;
    for (const double v : map) sum += v * v;
    return sum;
  }

  // Whether powers leave what T holds: then the sample is computed in double.
  static bool beyond(double squares) { return sizeof(T) == 4 && !(squares > 1e-40 && squares < 1e60); }

  FeatureScale attention(const RowsTensor& x, int64_t C, int64_t b, bool share, std::vector<double>& map,
                         bool& wide) const {
    sums<T>(x, C, b, share, map);
    double square = squares(map);
    wide = beyond(square);
    if (wide) {
      sums<double>(x, C, b, share, map);
      square = squares(map);
    }
    const FeatureScale scale = feature_scale(Feature::kL2, 0, square, positions_);
    for (double& v : map) v *= scale.factor;
    return scale;
  }

  double sample(int64_t b, double upstream, bool share) const {
    std::vector<double> map(positions_), teacher_map(positions_);
    bool wide = false, unused = false;
    const FeatureScale scale = attention(student_, C_, b, share, map, wide);
    attention(teacher_, teacher_C_, b, share, teacher_map, unused);
    double loss = 0, along = 0;
    for (int64_t i = 0; i < positions_; ++i) {
      const double e = map[i] - teacher_map[i];
      loss += e * e;
      along += map[i] * e;
    }
    if (!grad_.data) return loss;
    const double all = upstream / (double(B_) * double(positions_));
    const FeatureSlope slope = feature_slope(Feature::kL2, scale, 0, along, positions_, all);
    for (int64_t i = 0; i < positions_; ++i) {
      teacher_map[i] = slope.k * (map[i] - teacher_map[i] - map[i] * slope.p) * p_ / double(C_);
    }
    positions(share, [&](int64_t begin, int64_t end) {
      const auto slopes = wide ? kernel<double>().slopes : kernel<T>().slopes;
      slopes(student_, grad_, C_, p_, b * positions_ + begin, b * positions_ + end, teacher_map.data() + begin,
             stream_);
    });
    return loss;
  }

  const double p_;
  const int64_t B_, positions_, C_, teacher_C_;
  const RowsTensor student_, teacher_;
  RowsTensor grad_{};
  bool stream_ = false;
};

void check_all(const AttentionInputs& in) {
  FASTKD_CHECK(in.student.is_cpu() && in.teacher.is_cpu(), "student and teacher: CPU tensors wanted");
  check(in);
}

Tensor empty_grad(const Tensor& student) {
  Tensor grad = torch::stable::empty_like(student);
  const int64_t bytes = grad.numel() * int64_t(grad.element_size());
  if (bytes > kLargeBytes) {
    prepare_pages(grad.mutable_data_ptr(), bytes,
                  [](int64_t pages, auto&& f) { torch::stable::parallel_for(0, pages, 1, f); });
  }
  return grad;
}

void attention_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const AttentionInputs in{AttentionCall::read(arguments)};
  const bool save = AttentionForward::read(arguments).save;
  check_all(in);
  const Tensor grad = save ? empty_grad(in.student) : torch::stable::new_empty(in.student, {0});
  Tensor loss = torch::stable::new_empty(in.student, {}, in.compute());
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    *static_cast<T*>(loss.mutable_data_ptr()) = T(Attention<T>(in, save ? &grad : nullptr).run(1));
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
}

void attention_bwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const AttentionInputs in{AttentionCall::read(arguments)};
  const Tensor upstream = AttentionBackward::read(arguments).upstream;
  check_all(in);
  FASTKD_CHECK(upstream.is_cpu() && upstream.numel() == 1 && upstream.scalar_type() == in.compute(),
               "upstream: one element of the loss's dtype wanted");
  const Tensor grad = empty_grad(in.student);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    Attention<T>(in, &grad).run(double(*static_cast<const T*>(upstream.const_data_ptr())));
  });
  stack[0] = torch::stable::detail::from(grad);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("attention_fwd", &attention_fwd);
  m.impl("attention_bwd", &attention_bwd);
}

}  // namespace fastkd
