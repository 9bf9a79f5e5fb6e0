// The rows ops on the CPU: checks the contract, allocates, deals rows or blocks to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <unistd.h>

#include <cmath>
#include <vector>

#include "common/rows_inputs.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/rows_kernel.h"
#include "cpu/scratch.h"
#include "math/jensen_shannon_series.h"

namespace fastkd {
namespace {

template <class T>
const T* optional_data(const OptionalTensor& x, int64_t N, ScalarType type, const char* name) {
  if (!x) return nullptr;
  FASTKD_CHECK(x->is_cpu() && x->scalar_type() == type && x->numel() == N && x->is_contiguous(), name,
               ": a contiguous CPU tensor with one element of the right dtype per row wanted");
  return static_cast<const T*>(x->const_data_ptr());
}

int64_t valid_rows(const bool* mask, int64_t N) {
  if (!mask) return N;
  int64_t n = 0;
  for (int64_t i = 0; i < N; ++i) n += mask[i];
  return n;
}

// What the sum over rows is multiplied by; 0 where no row counts.
template <class T>
double sum_scale(const RowsInputs& in, const bool* mask) {
  const Reduction reduction = Reduction(in.reduction);
  if (reduction == Reduction::kNone) return 1;
  const int64_t valid = valid_rows(mask, in.N());
  if (valid == 0) return 0;
  if (in.normalizer_tensor) {
    return 1.0 / double(*optional_data<T>(in.normalizer_tensor, 1, in.compute(), "normalizer"));
  }
  if (in.normalizer) return 1.0 / *in.normalizer;
  if (reduction == Reduction::kSum) return 1;
  return 1.0 / (double(valid) * (reduction == Reduction::kMean ? double(in.V()) : 1.0));
}

int64_t second_level_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return int64_t(1) << 20;
}

// Past this size a gradient is written past the caches, which it would only flush; unless it goes
// where the logits were just read: their lines are in cache (86 % of the copy bandwidth, against 72 %).
constexpr int64_t kStreamBytes = int64_t(16) << 20;

template <class T>
RowsParams<T> params(const RowsInputs& in, void* grad, const Tensor& grad_like) {
  RowsParams<T> P{};
  const ScalarType type = in.compute();
  P.divergence = Divergence(in.divergence);
  P.parameter = divergence_parameter<T>(P.divergence, in.parameter);
  P.N = in.N();
  P.V = in.V();
  P.student = rows_tensor(in.student, const_cast<void*>(in.student.const_data_ptr()), "student");
  P.teacher = rows_tensor(in.teacher, const_cast<void*>(in.teacher.const_data_ptr()), "teacher");
  if (grad) P.grad = rows_tensor(grad_like, grad, "grad");
  P.temperature = optional_data<T>(in.temperature_rows, P.N, type, "temperature");
  P.teacher_temperature = optional_data<T>(in.teacher_temperature_rows, P.N, type, "teacher_temperature");
  P.temperature_all = in.temperature;
  P.teacher_temperature_all = in.teacher_temperature;
  P.t_squared = in.t_squared;
  P.mask = optional_data<bool>(in.mask, P.N, ScalarType::Bool, "mask");
  P.weight = optional_data<T>(in.weight, P.N, type, "weight");
  P.grad_scale = sum_scale<T>(in, P.mask);
  const bool inplace = P.grad.data == P.student.data;
  P.stream = grad && !inplace && P.grad.stride_v == 1 && P.N * P.V * P.grad.element_size > kStreamBytes;
  const int64_t footprint = 3 * int64_t(sizeof(T)) + P.student.element_size + P.teacher.element_size;
  P.prefetch = P.V * footprint <= second_level_cache();
  return P;
}

template <class T>
const RowsKernel<T>& kernel(Divergence which) {
#if FASTKD_X86
  switch (isa()) {
    case Isa::kBaseline:
      break;
    case Isa::kAvx2:
      return avx2::rows_kernel<T>(which);
    case Isa::kAvx512:
      return avx512::rows_kernel<T>(which);
  }
#endif
  return baseline::rows_kernel<T>(which);
}

constexpr int64_t kGrain = 16384;  // classes that are worth a thread
constexpr int64_t kBlockGrain = kGrain / kRowsBlock;

// Rows are dealt to threads; few long rows are shared, block by block, by all of them.
bool share_rows(int64_t N, int64_t V) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads > 1 && N < 2 * threads && rows_blocks(V) >= 2 * kBlockGrain;
}
int64_t row_grain(int64_t V) { return (kGrain + V - 1) / V; }

template <class T>
void forward(const RowsParams<T>& P) {
  using torch::stable::parallel_for;
  const RowsKernel<T>& k = kernel<T>(P.divergence);
  const int64_t blocks = rows_blocks(P.V);
  if (!share_rows(P.N, P.V)) {
    parallel_for(0, P.N, row_grain(P.V), [&](int64_t begin, int64_t end) {
      k.forward(P, RowsWorkspace<T>(scratch(RowsWorkspace<T>::bytes(P.V)), P.V), begin, end);
    });
    return;
  }
  const RowsWorkspace<T> W(scratch(RowsWorkspace<T>::bytes(P.V)), P.V);
  for (int64_t row = 0; row < P.N; ++row) {
    if (P.mask && !P.mask[row]) {
      k.forward(P, W, row, row + 1);
      continue;
    }
    parallel_for(0, blocks, kBlockGrain, [&](int64_t begin, int64_t end) { k.statistics(P, W, row, begin, end); });
    RowsStats stats = k.combine(P, W, row);
    parallel_for(0, blocks, kBlockGrain, [&](int64_t begin, int64_t end) { k.reduce(P, W, row, stats, begin, end); });
    if (k.add_slopes) {
      k.add_slopes(P, W, stats);
      parallel_for(0, blocks, kBlockGrain,
                   [&](int64_t begin, int64_t end) { k.gradient(P, W, row, stats, begin, end); });
    }
    k.finish(P, W, row, stats);
  }
}

template <class T>
void backward(const RowsParams<T>& P) {
  using torch::stable::parallel_for;
  const RowsKernel<T>& k = kernel<T>(P.divergence);
  if (!share_rows(P.N, P.V)) {
    parallel_for(0, P.N, row_grain(P.V), [&](int64_t begin, int64_t end) { k.backward(P, begin, end); });
    return;
  }
  for (int64_t row = 0; row < P.N; ++row) {
    parallel_for(0, rows_blocks(P.V), kBlockGrain,
                 [&](int64_t begin, int64_t end) { k.backward_part(P, row, begin, end); });
  }
}

// Runs the forward pass into a new loss; grad and stats where they are wanted.
template <class T>
Tensor run_forward(const RowsInputs& in, void* grad, const Tensor& grad_like, RowsStats* stats) {
  RowsParams<T> P = params<T>(in, grad, grad_like);
  P.stats = stats;
  const bool scalar = Reduction(in.reduction) != Reduction::kNone;
  const std::vector<int64_t> shape = scalar ? std::vector<int64_t>{} : in.leading();
  Tensor loss = torch::stable::new_empty(in.student, shape, in.compute());
  std::vector<T> rows(scalar ? P.N : 0);
  P.loss = scalar ? rows.data() : static_cast<T*>(loss.mutable_data_ptr());
  forward(P);
  if (scalar) {
    double sum = 0;
    for (const T x : rows) sum += double(x);
    *static_cast<T*>(loss.mutable_data_ptr()) = P.grad_scale == 0 ? T(0) : T(sum * P.grad_scale);
  }
  return loss;
}

Tensor empty_grad(const Tensor& student) {
  Tensor grad = torch::stable::new_empty(student, student.sizes());
  const int64_t bytes = grad.numel() * int64_t(grad.element_size());
  if (bytes > kStreamBytes) {
    prepare_pages(grad.mutable_data_ptr(), bytes,
                  [](int64_t pages, auto&& f) { torch::stable::parallel_for(0, pages, 1, f); });
  }
  return grad;
}

void rows_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  const int64_t save = arguments.next<int64_t>();
  check(in);
  FASTKD_CHECK(save >= 0 && save <= 2, "save: 0, 1 or 2 wanted, got ", save);
  const Tensor nothing = torch::stable::new_empty(in.student, {0});
  const Tensor grad = save == 1 ? empty_grad(in.student) : nothing;
  std::vector<int64_t> stats_shape = in.leading();
  stats_shape.push_back(sizeof(RowsStats) / sizeof(double));
  const Tensor stats = save == 2 ? torch::stable::new_empty(in.student, stats_shape, ScalarType::Double)
                                 : torch::stable::new_empty(in.student, {0}, ScalarType::Double);
  const Tensor loss = dispatch_compute(in.compute(), [&](auto t) {
    using T = decltype(t);
    return run_forward<T>(in, save == 1 ? grad.mutable_data_ptr() : nullptr, grad,
                          save == 2 ? static_cast<RowsStats*>(stats.mutable_data_ptr()) : nullptr);
  });
  stack[0] = torch::stable::detail::from(loss);
  stack[1] = torch::stable::detail::from(grad);
  stack[2] = torch::stable::detail::from(stats);
}

void rows_fwd_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  check(in);
  stack[0] = torch::stable::detail::from(dispatch_compute(in.compute(), [&](auto t) {
    return run_forward<decltype(t)>(in, in.student.mutable_data_ptr(), in.student, nullptr);
  }));
}

void run_backward(const RowsInputs& in, const Tensor& stats, const Tensor& upstream, const Tensor& grad) {
  const ScalarType type = in.compute();
  FASTKD_CHECK(stats.scalar_type() == ScalarType::Double && stats.numel() == 5 * in.N() && stats.is_contiguous(),
               "stats: those of rows_fwd wanted");
  FASTKD_CHECK(upstream.numel() == 1 || upstream.numel() == in.N(), "upstream: one element, or one per row wanted");
  dispatch_compute(type, [&](auto t) {
    using T = decltype(t);
    RowsParams<T> P = params<T>(in, grad.mutable_data_ptr(), grad);
    P.stats = static_cast<RowsStats*>(const_cast<void*>(stats.const_data_ptr()));
    P.upstream = optional_data<T>(upstream, upstream.numel(), type, "upstream");
    P.upstream_stride = upstream.numel() == 1 ? 0 : 1;
    backward(P);
  });
}

void rows_bwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  const Tensor stats = arguments.next<Tensor>(), upstream = arguments.next<Tensor>();
  check(in);
  const Tensor grad = empty_grad(in.student);
  run_backward(in, stats, upstream, grad);
  stack[0] = torch::stable::detail::from(grad);
}

void rows_bwd_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const RowsInputs in(arguments);
  const Tensor stats = arguments.next<Tensor>(), upstream = arguments.next<Tensor>();
  check(in);
  run_backward(in, stats, upstream, in.student);
}

// Not registered for a device: it takes no tensor.
void cpu_isa(StableIValue* stack, uint64_t, uint64_t) {
  const auto name = Arguments(stack).next<std::string>();
  if (name != "?") set_isa(name);
  stack[0] = torch::stable::detail::from(std::string(isa_name()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("rows_fwd", &rows_fwd);
  m.impl("rows_fwd_", &rows_fwd_);
  m.impl("rows_bwd", &rows_bwd);
  m.impl("rows_bwd_", &rows_bwd_);
}
STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) { m.impl("cpu_isa", &cpu_isa); }

}  // namespace fastkd
