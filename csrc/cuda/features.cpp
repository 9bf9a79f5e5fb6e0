// The features ops on the GPU: checks the contract, allocates, launches: one launch of as many layers
// as its parameters hold, one that sums up, one that counts rows where they are masked. Nothing here
// waits for the device. FASTKD_CUSIM: the same over host memory, for the tests, in a namespace of its own.
#include <optional>
#include <vector>

#include "common/features_inputs.h"
#include "cuda/context.h"
#include "cuda/features_plan.h"
#include "cuda/features_tensors.h"

namespace fastkd {
namespace {

using cuda::Context;
using cuda::FeaturesPart;
using cuda::lies_with;

void check_all(const FeaturesInputs& in) {
  check(in);
  for (size_t l = 0; l < in.layers(); ++l) {
    FASTKD_CHECK(lies_with(in.student[l], in.student[0]) && lies_with(in.teacher[l], in.student[0]),
                 "student and teacher: tensors on one device wanted, layer ", l, " is elsewhere");
    FASTKD_CHECK(in.D(l) <= cuda::kFeaturesMost, "student: at most ", cuda::kFeaturesMost, " features wanted, layer ",
                 l, " has ", in.D(l));
  }
}

template <class T>
class Elements {
 public:
  // grads: one for each layer, or none
  Elements(const FeaturesInputs& in, const std::vector<Tensor>& grads)
      : in_(in), grads_(grads), context_(in.student[0]) {}

  // Outputs that are null are not wanted.
  void run(const T* upstream, int64_t upstream_stride, T* row_loss, T* layers, T* loss) const {
    const std::optional<Tensor> total = layers ? std::optional<Tensor>(doubles(1)) : std::nullopt;
    int64_t row = 0;
    for (size_t begin = 0; begin < in_.layers(); begin += cuda::kFeaturesLayers) {
      cuda::FeaturesParams<T> P{};
      P.count = int32_t(std::min<size_t>(in_.layers() - begin, cuda::kFeaturesLayers));
      P.feature = Feature(in_.feature);
      P.of_smooth_l1 = in_.beta.has_value();
      P.smooth_l1 = SmoothL1<T>(in_.beta.value_or(0));
      P.upstream = upstream;
      P.upstream_stride = upstream_stride;
      P.row_loss = row_loss;
      for (int l = 0; l < P.count; ++l) {
        P.layers[l] = part(begin + l);
        P.layers[l].first_row = row;
        row += in_.N(begin + l);
      }
      const cuda::FeaturesGrid grid = cuda::plan_blocks(P.layers, P.count, context_.device);
      const int64_t blocks = grid.blocks;
      P.state_rows = grid.rows;
      P.room = grid.room;
      const std::optional<Tensor> scales = count(P, begin);
      const std::optional<Tensor> partials = layers ? std::optional<Tensor>(doubles(blocks)) : std::nullopt;
      if (partials) P.partials = static_cast<double*>(partials->mutable_data_ptr());
      if (blocks > 0) FASTKD_CUDA_CHECK(cuda::features(P, blocks, context_.stream));
      if (!layers) continue;
      double* so_far = static_cast<double*>(total->mutable_data_ptr());
      FASTKD_CUDA_CHECK(cuda::features_finish(losses(P, begin, blocks, so_far, layers + begin, loss), context_.stream));
    }
  }

 private:
  Tensor doubles(int64_t n) const { return torch::stable::new_empty(in_.student[0], {n}, ScalarType::Double); }

  template <class D>
  const D* data(const std::vector<Tensor>& x, size_t l, ScalarType type, const char* name) const {
    if (x.empty()) return nullptr;
    FASTKD_CHECK(lies_with(x[l], in_.student[0]) && x[l].scalar_type() == type && x[l].numel() == in_.N(l) &&
                     x[l].is_contiguous(),
                 name, ": a contiguous tensor on the student's device with one element of the right dtype per row ",
                 "wanted in layer ", l);
    return static_cast<const D*>(x[l].const_data_ptr());
  }

  // What the number of rows that count is multiplied by, for the divisor of the layer's sum; 0: it has none.
  double divisor(size_t l) const {
    switch (Reduction(in_.reduction)) {
      case Reduction::kBatchMean:
        return 1;
      case Reduction::kMean:  // of cosines the mean over rows
        return Feature(in_.feature) == Feature::kCosine ? 1 : double(in_.D(l));
      default:
        return 0;
    }
  }

  FeaturesPart<T> part(size_t l) const {
    const Tensor* grad = grads_.empty() ? nullptr : &grads_[l];
    const FeaturesLayer layer = features_layer(in_, l, grad);
    FeaturesPart<T> p{};
    p.student = cuda::features_tensor(layer.student);
    p.teacher = cuda::features_tensor(layer.teacher);
    if (grad) p.grad = cuda::features_tensor(layer.grad);
    if (layer.flat) {
      cuda::plan_flat(p, layer.numel);
    } else {
      p.N = layer.N;
      p.D = layer.D;
      cuda::set_leading(p, {{&in_.student[l], &p.student}, {&in_.teacher[l], &p.teacher}, {grad, &p.grad}},
                        in_.feature_dim[l]);
      cuda::plan_rows(p, normalized(Feature(in_.feature)));
    }
    p.mask = data<bool>(in_.mask, l, ScalarType::Bool, "mask");
    p.weight = data<T>(in_.weight, l, in_.compute(), "weight");
    const int64_t rows = in_.N(l);
    p.scale = rows == 0 ? 0 : divisor(l) == 0 ? 1 : 1 / (double(rows) * divisor(l));
    p.layer_weight = in_.layer_weights[l];
    return p;
  }

  // Where the device must count the rows, for it to know what their sums are multiplied by.
  std::optional<Tensor> count(cuda::FeaturesParams<T>& P, size_t begin) const {
    if (in_.mask.empty() || divisor(begin) == 0) return std::nullopt;
    const Tensor scales = doubles(P.count);
    cuda::FeaturesCounts C{};
    C.count = P.count;
    C.scales = static_cast<double*>(scales.mutable_data_ptr());
    for (int l = 0; l < P.count; ++l) {
      C.mask[l] = P.layers[l].mask;
      C.N[l] = P.layers[l].N;
      C.divisor[l] = divisor(begin + l);
    }
    FASTKD_CUDA_CHECK(cuda::features_count(C, context_.stream));
    P.scales = C.scales;
    return scales;
  }

  cuda::FeaturesLosses<T> losses(const cuda::FeaturesParams<T>& P, size_t begin, int64_t blocks, double* total,
                                 T* layers, T* loss) const {
    cuda::FeaturesLosses<T> L{};
    L.count = P.count;
    for (int l = 0; l < P.count; ++l) {
      L.first_block[l] = P.layers[l].first_block;
      L.scale[l] = P.layers[l].scale;
      L.layer_weight[l] = P.layers[l].layer_weight;
    }
    L.first_block[P.count] = int32_t(blocks);
    L.scales = P.scales;
    L.partials = P.partials;
    L.total = total;
    L.first = begin == 0;
    L.layers = layers;
    L.loss = loss;
    return L;
  }

  const FeaturesInputs& in_;
  const std::vector<Tensor>& grads_;
  const Context context_;
};

std::vector<Tensor> empty_grads(const FeaturesInputs& in) {
  std::vector<Tensor> grads;
  for (const Tensor& x : in.student) grads.push_back(torch::stable::empty_like(x));
  return grads;
}

// Loss and layers; the gradients where there is a place for them.
std::pair<Tensor, Tensor> run_forward(const FeaturesInputs& in, const std::vector<Tensor>& grads) {
  const bool per_row = Reduction(in.reduction) == Reduction::kNone;
  const auto empty = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(in.student[0], shape, in.compute());
  };
  const Tensor loss = empty(per_row ? std::vector<int64_t>{in.rows()} : std::vector<int64_t>{});
  const Tensor layers = empty({int64_t(in.layers())});
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(loss.mutable_data_ptr());
    Elements<T>(in, grads).run(nullptr, 0, per_row ? to : nullptr, static_cast<T*>(layers.mutable_data_ptr()),
                               per_row ? nullptr : to);
  });
  return {loss, layers};
}

void features_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const FeaturesInputs in(LayersCall::read(arguments));
  const bool save = LayersForward::read(arguments).save;
  check_all(in);
  const std::vector<Tensor> grads = save ? empty_grads(in) : std::vector<Tensor>{};
  const auto [loss, layers] = run_forward(in, grads);
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(layers);
  stack[2] = torch::stable::detail::from(grads);
}

void features_fwd_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const FeaturesInputs in(OneLayerCall::read(arguments));
  check_all(in);
  const Reduction reduction = Reduction(in.reduction);
  FASTKD_CHECK(reduction == Reduction::kNone || reduction == Reduction::kSum, "reduction: per row or the sum wanted");
  stack[0] = torch::stable::detail::from(run_forward(in, in.student).first);
}

void features_bwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const FeaturesInputs in(LayersCall::read(arguments));
  const Tensor upstream = LayersBackward::read(arguments).upstream;
  check_all(in);
  FASTKD_CHECK(lies_with(upstream, in.student[0]) && upstream.scalar_type() == in.compute() &&
                   upstream.is_contiguous() && (upstream.numel() == 1 || upstream.numel() == in.rows()),
               "upstream: one element of the loss's dtype, or one per row wanted");
  const std::vector<Tensor> grads = empty_grads(in);
  dispatch_compute(in.compute(), [&](auto zero) {
    using T = decltype(zero);
    Elements<T>(in, grads).run(static_cast<const T*>(upstream.const_data_ptr()), upstream.numel() == 1 ? 0 : 1, nullptr,
                               nullptr, nullptr);
  });
  stack[0] = torch::stable::detail::from(grads);
}

}  // namespace

#if defined(FASTKD_CUSIM)
STABLE_TORCH_LIBRARY_IMPL(fastkd_cusim, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
#endif
  m.impl("features_fwd", &features_fwd);
  m.impl("features_fwd_", &features_fwd_);
  m.impl("features_bwd", &features_bwd);
}

}  // namespace fastkd
