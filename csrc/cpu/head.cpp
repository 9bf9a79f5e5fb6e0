// The op of adaptive_kl_div's weights on the CPU: deals rows to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/head_inputs.h"
#include "cpu/head_kernel.h"
#include "cpu/isa.h"
#include "cpu/rows_groups.h"
#include "cpu/scratch.h"

namespace fastkd {
namespace {

template <class T>
const HeadKernel<T>& kernel() {
  return FASTKD_OF_ISA(head_kernel<T>());
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static constexpr const char* kName = "on the CPU";
  static constexpr bool kValuesAtHand = true;
  static bool lies_with(const Tensor& x, const Tensor&) { return x.is_cpu(); }

  template <class T>
  void head(RowsParams<T>& P, double* weight) const {
    using torch::stable::parallel_for;
    const int64_t footprint = 2 * int64_t(sizeof(T)) + P.student.element_size + P.teacher.element_size;
    P.prefetch = P.V * footprint <= second_level_cache();
    if (const Groups groups = groups_of(P, true); groups.rows > 0) {
      parallel_for(0, groups.count, group_grain(P.V, groups), [&](int64_t first, int64_t last) {
        void* memory = scratch(HeadKernel<T>::lanes_bytes(P.V, groups.rows));
        for (int64_t group = first; group < last; ++group) {
          const auto [begin, end] = groups.of(group);
          kernel<T>().lanes(P, memory, begin, end, weight);
        }
      });
      return;
    }
    parallel_for(0, P.N, row_grain(P.V), [&](int64_t begin, int64_t end) {
      kernel<T>().rows(P, scratch(HeadKernel<T>::rows_bytes(P.V)), begin, end, weight);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("head_weight", &head_weight<Cpu>); }

}  // namespace fastkd
