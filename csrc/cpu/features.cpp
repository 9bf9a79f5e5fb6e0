// The features ops on the CPU: checks the contract, allocates, deals blocks of rows of all layers to
// threads in one parallel region.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/features_inputs.h"
#include "cpu/features_kernel.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/scratch.h"

namespace fastkd {
namespace {

template <class T>
const FeaturesKernel<T>& kernel(const FeaturesInputs& in) {
  return FASTKD_OF_ISA(features_kernel<T>(Feature(in.feature), in.beta.has_value()));
}

constexpr int64_t kStreamBytes = int64_t(16) << 20;

// Rows begin .. end of a layer, which a thread takes at a time.
struct Block {
  size_t layer;
  int64_t begin, end;
};

template <class T>
class Elements {
 public:
  // grads: one for each layer, or none
  Elements(const FeaturesInputs& in, const std::vector<Tensor>& grads) : in_(in), kernel_(kernel<T>(in)) {
    int64_t row = 0, bytes = 0;
    for (size_t l = 0; l < in.layers(); ++l) {
      FeaturesLayer layer = features_layer(in, l, grads.empty() ? nullptr : &grads[l]);
      layer.mask = data<bool>(in.mask, l, ScalarType::Bool, "mask");
      layer.weight = data<T>(in.weight, l, in.compute(), "weight");
      layer.first_row = row;
      row += in.N(l);
      if (!grads.empty()) bytes += layer.numel * layer.grad.element_size;
      layers_.push_back(layer);
      scales_.push_back(scale(l, layer.mask));
      const int64_t step = kernel_.block_rows(layer);
      for (int64_t begin = 0; begin < layer.N; begin += step) {
        blocks_.push_back({l, begin, begin + step < layer.N ? begin + step : layer.N});
      }
    }
    const bool over_student = !grads.empty() && layers_[0].grad.data == layers_[0].student.data;
    stream_ = bytes > kStreamBytes && !over_student;
  }

  // The sum of each layer's rows, times what its reduction says.
  std::vector<double> run(const T* upstream, int64_t upstream_stride, T* row_loss) const {
    const FeaturesCall<T> call{upstream, upstream_stride, row_loss, stream_, SmoothL1<T>(in_.beta.value_or(0))};
    std::vector<double> sums(blocks_.size());
    torch::stable::parallel_for(0, int64_t(blocks_.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block& b = blocks_[i];
        const FeaturesLayer& layer = layers_[b.layer];
        sums[i] = kernel_.rows(layer, call, scales_[b.layer] * layer.layer_weight, b.begin, b.end,
                               scratch(kernel_.scratch(layer)));
      }
    });
    std::vector<double> losses(layers_.size());
    for (size_t i = 0; i < blocks_.size(); ++i) losses[blocks_[i].layer] += sums[i];
    for (size_t l = 0; l < layers_.size(); ++l) losses[l] = scales_[l] == 0 ? 0 : losses[l] * scales_[l];
    return losses;
  }

 private:
  template <class D>
  const D* data(const std::vector<Tensor>& x, size_t l, ScalarType type, const char* name) const {
    if (x.empty()) return nullptr;
    FASTKD_CHECK(x[l].is_cpu() && x[l].scalar_type() == type && x[l].numel() == in_.N(l) && x[l].is_contiguous(), name,
                 ": a contiguous CPU tensor with one element of the right dtype per row wanted in layer ", l);
    return static_cast<const D*>(x[l].const_data_ptr());
  }
  // What the sum over a layer's rows is multiplied by; 0 where no row counts.
  double scale(size_t l, const bool* mask) const {
    int64_t valid = in_.N(l);
    if (mask) valid = std::count(mask, mask + in_.N(l), true);
    if (valid == 0) return 0;
    switch (Reduction(in_.reduction)) {
      case Reduction::kBatchMean:
        return 1.0 / double(valid);
      case Reduction::kMean:  // of cosines the mean over rows
        return 1.0 / (double(valid) * (Feature(in_.feature) == Feature::kCosine ? 1.0 : double(in_.D(l))));
      default:
        return 1;
    }
  }

  const FeaturesInputs& in_;
  const FeaturesKernel<T>& kernel_;
  std::vector<FeaturesLayer> layers_;
  std::vector<double> scales_;
  std::vector<Block> blocks_;
  bool stream_ = false;
};

void check_all(const FeaturesInputs& in) {
  check(in);
  for (size_t l = 0; l < in.layers(); ++l) {
    FASTKD_CHECK(in.student[l].is_cpu() && in.teacher[l].is_cpu(), "student and teacher: CPU tensors wanted");
  }
}

std::vector<Tensor> empty_grads(const FeaturesInputs& in) {
  std::vector<Tensor> grads;
  for (const Tensor& x : in.student) {
    grads.push_back(torch::stable::empty_like(x));
    const int64_t bytes = x.numel() * int64_t(x.element_size());
    if (bytes > kStreamBytes) {
      prepare_pages(grads.back().mutable_data_ptr(), bytes,
                    [](int64_t pages, auto&& f) { torch::stable::parallel_for(0, pages, 1, f); });
    }
  }
  return grads;
}

void features_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const FeaturesInputs in(LayersCall::read(arguments));
  const bool save = LayersForward::read(arguments).save;
  check_all(in);
  const bool per_row = Reduction(in.reduction) == Reduction::kNone;
  const auto empty = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(in.student[0], shape, in.compute());
  };
  const std::vector<Tensor> grads = save ? empty_grads(in) : std::vector<Tensor>{};
  const Tensor loss = empty(per_row ? std::vector<int64_t>{in.rows()} : std::vector<int64_t>{});
  const Tensor layers = empty({int64_t(in.layers())});
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(loss.mutable_data_ptr());
    const std::vector<double> found = Elements<T>(in, grads).run(nullptr, 0, per_row ? to : nullptr);
    double total = 0;
    for (size_t l = 0; l < found.size(); ++l) {
      static_cast<T*>(layers.mutable_data_ptr())[l] = T(found[l]);
      total += found[l] * in.layer_weights[l];
    }
    if (!per_row) *to = T(total);
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(layers);
  stack[2] = torch::stable::detail::from(grads);
}

void features_fwd_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const FeaturesInputs in(OneLayerCall::read(arguments));
  check_all(in);
  const bool per_row = Reduction(in.reduction) == Reduction::kNone;
  FASTKD_CHECK(per_row || Reduction(in.reduction) == Reduction::kSum, "reduction: per row or the sum wanted");
  const std::vector<int64_t> shape = per_row ? std::vector<int64_t>{in.rows()} : std::vector<int64_t>{};
  const Tensor loss = torch::stable::new_empty(in.student[0], shape, in.compute());
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(loss.mutable_data_ptr());
    const double sum = Elements<T>(in, in.student).run(nullptr, 0, per_row ? to : nullptr)[0];
    if (!per_row) *to = T(sum);
  });
  stack[0] = torch::stable::detail::from(loss);
}

void features_bwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const FeaturesInputs in(LayersCall::read(arguments));
  const Tensor upstream = LayersBackward::read(arguments).upstream;
  check_all(in);
  FASTKD_CHECK(upstream.is_cpu() && upstream.scalar_type() == in.compute() && upstream.is_contiguous() &&
                   (upstream.numel() == 1 || upstream.numel() == in.rows()),
               "upstream: one element of the loss's dtype, or one per row wanted");
  const std::vector<Tensor> grads = empty_grads(in);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    Elements<T>(in, grads).run(static_cast<const T*>(upstream.const_data_ptr()), upstream.numel() == 1 ? 0 : 1,
                               nullptr);
  });
  stack[0] = torch::stable::detail::from(grads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("features_fwd", &features_fwd);
  m.impl("features_fwd_", &features_fwd_);
  m.impl("features_bwd", &features_bwd);
}

}  // namespace fastkd
