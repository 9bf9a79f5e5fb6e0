// The rows ops on the CPU: deals rows or blocks to threads.
#include "cpu/rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "common/rows_op.h"
#include "cpu/isa.h"
#include "cpu/pages.h"
#include "cpu/rows_groups.h"
#include "cpu/rows_kernel.h"
#include "cpu/rows_parts.h"
#include "cpu/scratch.h"

namespace fastkd {
namespace {

// Past this size a gradient is written past the caches, which it would only flush; unless it goes
// where the logits were just read: their lines are in cache (86 % of the copy bandwidth, against 72 %).
constexpr int64_t kStreamBytes = int64_t(16) << 20;

// Whether the elements fill their memory without gaps, in whatever order.
bool is_dense(const RowsTensor& x, int64_t V) {
  std::vector<std::pair<int64_t, int64_t>> steps{{x.stride_v, V}};
  for (int d = 0; d < x.dims; ++d) steps.emplace_back(x.stride[d], x.size[d]);
  std::sort(steps.begin(), steps.end());
  int64_t next = 1;
  for (const auto& [stride, size] : steps) {
    if (size != 1 && stride != next) return false;
    next *= size;
  }
  return true;
}

template <class T>
const RowsKernel<T>& kernel(Divergence which) {
  return FASTKD_OF_ISA(rows_kernel<T>(which));
}
template <class T>
const RowsLanes<T>& lanes(Divergence which) {
  return FASTKD_OF_ISA(rows_lanes<T>(which));
}

// Rows begin .. end, one by one where there is something to tell of each: it is in cache then.
template <class T>
void forward_of_rows(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t begin, int64_t end) {
  const RowsKernel<T>& k = kernel<T>(P.divergence);
  if (!P.parts || k.describes) return k.forward(P, W, begin, end);
  const RowsDescribe<T> describe = FASTKD_OF_ISA(rows_describe<T>());
  for (int64_t row = begin; row < end; ++row) {
    describe(P, row, row + 1, end);
    k.forward(P, W, row, row + 1);
  }
}

constexpr int64_t kBlockGrain = kGrain / kRowsBlock;

// Rows are dealt to threads; few long rows are shared, block by block, by all of them.
bool share_rows(int64_t N, int64_t V) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads > 1 && N < 2 * threads && rows_blocks(V) >= 2 * kBlockGrain;
}

template <class T>
void forward(const RowsParams<T>& P) {
  using torch::stable::parallel_for;
  const RowsKernel<T>& k = kernel<T>(P.divergence);
  if (const Groups groups = groups_of(P, P.hard.target != nullptr); groups.rows > 0) {
    const RowsLanes<T>& together = lanes<T>(P.divergence);
    const bool targets = P.hard.target != nullptr;
    const int64_t bytes =
        std::max(RowsLanes<T>::bytes(P.V, groups.rows, targets), RowsWorkspace<T>::bytes(P.V, targets));
    parallel_for(0, groups.count, group_grain(P.V, groups), [&](int64_t first, int64_t last) {
      void* memory = scratch(bytes);
      for (int64_t group = first; group < last; ++group) {
        const auto [begin, end] = groups.of(group);
        if (together.any_parameters || one_parameter(P, begin, end)) {
          if (P.parts) FASTKD_OF_ISA(rows_describe<T>())(P, begin, end, end);
          together.forward(P, memory, begin, end);
        } else {
          forward_of_rows(P, RowsWorkspace<T>(memory, P.V, targets), begin, end);
        }
      }
    });
    return;
  }
  const int64_t blocks = rows_blocks(P.V);
  const auto workspace = [V = P.V, targets = P.hard.target != nullptr] {
    return RowsWorkspace<T>(scratch(RowsWorkspace<T>::bytes(V, targets)), V, targets);
  };
  if (!share_rows(P.N, P.V)) {
    parallel_for(0, P.N, row_grain(P.V),
                 [&](int64_t begin, int64_t end) { forward_of_rows(P, workspace(), begin, end); });
    return;
  }
  if (P.parts && !k.describes) {
    const RowsDescribe<T> describe = FASTKD_OF_ISA(rows_describe<T>());
    parallel_for(0, P.N, 1, [&](int64_t begin, int64_t end) { describe(P, begin, end, end); });
  }
  const RowsWorkspace<T> W = workspace();
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
  if (const Groups groups = groups_of(P, P.hard.target != nullptr); groups.rows > 0) {
    const RowsLanes<T>& together = lanes<T>(P.divergence);
    parallel_for(0, groups.count, group_grain(P.V, groups), [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) {
        const auto [begin, end] = groups.of(group);
        const bool all = together.any_parameters || one_parameter(P, begin, end);
        all ? together.backward(P, begin, end) : k.backward(P, begin, end);
      }
    });
    return;
  }
  if (!share_rows(P.N, P.V)) {
    parallel_for(0, P.N, row_grain(P.V), [&](int64_t begin, int64_t end) { k.backward(P, begin, end); });
    return;
  }
  for (int64_t row = 0; row < P.N; ++row) {
    parallel_for(0, rows_blocks(P.V), kBlockGrain,
                 [&](int64_t begin, int64_t end) { k.backward_part(P, row, begin, end); });
  }
}

// f(workspace, row) of the rows that count; of the others statistics, sums and gradient are 0.
template <class T, class F>
void for_rows_in_phase(const RowsParams<T>& P, F&& f) {
  const bool targets = P.hard.target != nullptr;
  torch::stable::parallel_for(0, P.N, row_grain(P.V), [&](int64_t begin, int64_t end) {
    const RowsWorkspace<T> W(scratch(RowsWorkspace<T>::bytes(P.V, targets)), P.V, targets);
    for (int64_t row = begin; row < end; ++row) {
      if (!P.mask || P.mask[row]) {
        f(W, row);
      } else if (P.sums) {
        P.sums[row] = {};
        if (P.grad.data) kernel<T>(P.divergence).backward_part(P, row, 0, rows_blocks(P.V));
      } else {
        P.stats[row] = {};
      }
    }
  });
}

// The first pass over some classes of a row, whose statistics are P.stats then.
template <class T>
void statistics(const RowsParams<T>& P) {
  const RowsKernel<T>& k = kernel<T>(P.divergence);
  const int64_t blocks = rows_blocks(P.V);
  for_rows_in_phase(P, [&](const RowsWorkspace<T>& W, int64_t row) {
    k.statistics(P, W, row, 0, blocks);
    RowsStats& stats = P.stats[row] = k.combine(P, W, row);
    if (P.hard.smoothing == 0) return;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n = std::min(kRowsBlock, P.V - b * kRowsBlock);
      stats.factor += W.blocks[b].logits + double(n) * (W.blocks[b].stats.max_student - stats.max_student);
    }
  });
}

// Both passes over some classes of a row, whose statistics are known.
template <class T>
void sums(const RowsParams<T>& P) {
  const RowsKernel<T>& k = kernel<T>(P.divergence);
  const int64_t blocks = rows_blocks(P.V);
  for_rows_in_phase(P, [&](const RowsWorkspace<T>& W, int64_t row) {
    const RowsStats& stats = P.stats[row];
    k.statistics(P, W, row, 0, blocks);
    k.reduce(P, W, row, stats, 0, blocks);
    RowSums& sums = P.sums[row] = {};
    if (stats.sum_teacher == 0) return;
    for (int64_t b = 0; b < blocks; ++b) {
      const RowsBlock& block = W.blocks[b];
      sums.loss += block.loss;
      sums.slope += block.slope;
      sums.second += block.second;
      if (block.stats.sum_teacher == 0) continue;
      const double inv_temperature = 1 / P.teacher_temperature[row];
      const double below = block.stats.max_teacher - stats.max_teacher;
      if (k.teacher_entropy) {
        sums.loss += (block.entropy - block.stats.sum_teacher * below) * inv_temperature *
                     std::exp(below * inv_temperature) / stats.sum_teacher;
      }
    }
  });
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static constexpr const char* kName = "on the CPU";
  static constexpr bool kValuesAtHand = true;
  static bool lies_with(const Tensor& x, const Tensor&) { return x.is_cpu(); }

  template <class T>
  void forward(RowsParams<T>& P, const Tensor& loss, bool per_row) const {
    prepare(P);
    const std::unique_ptr<T[]> rows(per_row ? nullptr : new T[P.N]);
    P.loss = per_row ? static_cast<T*>(loss.mutable_data_ptr()) : rows.get();
    fastkd::forward(P);
    if (per_row) return;
    double sum = 0;
    for (int64_t row = 0; row < P.N; ++row) sum += double(P.loss[row]);
    *static_cast<T*>(loss.mutable_data_ptr()) = P.grad_scale == 0 ? T(0) : T(sum * P.grad_scale);
  }

  template <class T>
  void backward(RowsParams<T>& P) const {
    prepare(P);
    fastkd::backward(P);
  }

  template <class T>
  void statistics(RowsParams<T>& P) const {
    fastkd::statistics(P);
  }

  template <class T>
  void sums(RowsParams<T>& P) const {
    prepare(P);
    fastkd::sums(P);
  }

  template <class T>
  static void inverse_divisor(const InverseDivisor& in) {
    int64_t valid = in.rows;
    if (in.mask) {
      const bool* mask = static_cast<const bool*>(in.mask->const_data_ptr());
      valid = 0;
      for (int64_t row = 0; row < in.rows; ++row) valid += mask[row];
    }
    const double divisor = in.normalizer ? double(*static_cast<const T*>(in.normalizer->const_data_ptr()))
                                         : double(valid) * double(in.each);
    *static_cast<double*>(in.scale.mutable_data_ptr()) = valid == 0 ? 0 : 1 / divisor;
  }

 private:
  // What a call on the CPU is told besides: the scale as a number, and how memory is written and read.
  template <class T>
  static void prepare(RowsParams<T>& P) {
    if (P.scale) P.grad_scale = *P.scale;
    FASTKD_CHECK(P.grad_scale >= 0, "normalizer: a positive finite number wanted, got ", 1 / P.grad_scale);
    const int64_t footprint = 3 * int64_t(sizeof(T)) + P.student.element_size + P.teacher.element_size;
    P.prefetch = P.V * footprint <= second_level_cache();
    const int64_t bytes = P.N * P.V * P.grad.element_size;
    if (!P.grad.data || P.grad.data == P.student.data || bytes <= kStreamBytes) return;
    P.stream = P.grad.stride_v == 1;
    if (is_dense(P.grad, P.V)) {
      prepare_pages(P.grad.data, bytes, [](int64_t pages, auto&& f) { torch::stable::parallel_for(0, pages, 1, f); });
    }
  }
};

// Not registered for a device: it takes no tensor.
void cpu_isa(StableIValue* stack, uint64_t, uint64_t) {
  const auto name = Arguments(stack).next<std::string>();
  if (name != "?") set_isa(name);
  stack[0] = torch::stable::detail::from(std::string(isa_name()));
}

void cpu_calls(StableIValue* stack, uint64_t, uint64_t) {
  stack[0] = torch::stable::detail::from(std::string(kCallsDigest) + "," + kDivergencesDigest);
}

}  // namespace

void rows_forward(const RowsCall& in, const RowsForward& out) { RowsOps<Cpu>::forward(in, out); }

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("rows_fwd", &RowsOps<Cpu>::forward);
  m.impl("rows_bwd", &RowsOps<Cpu>::backward);
  m.impl("rows_statistics", &RowsOps<Cpu>::statistics);
  m.impl("rows_sums", &RowsOps<Cpu>::sums);
  m.impl("inverse_divisor", &RowsOps<Cpu>::inverse_divisor);
}
STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", &cpu_isa);
  m.impl("cpu_calls", &cpu_calls);
}

}  // namespace fastkd
