// The ops that standardize logits on the CPU: deals rows to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/standardize_op.h"
#include "cpu/isa.h"
#include "cpu/standardize_kernel.h"

namespace fastkd {
namespace {

constexpr int64_t kGrain = 16384;  // classes that are worth a thread

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static constexpr const char* kName = "on the CPU";
  static bool lies_with(const Tensor& x, const Tensor&) { return x.is_cpu(); }

  template <class T>
  void run(const StandardizeParams<T>& P, bool backward) const {
    const StandardizeKernel<T>& k = FASTKD_OF_ISA(standardize_kernel<T>());
    torch::stable::parallel_for(0, P.rows.N, (kGrain + P.rows.V - 1) / P.rows.V, [&](int64_t begin, int64_t end) {
      backward ? k.backward(P, begin, end) : k.forward(P, begin, end);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("standardize_fwd", &StandardizeOps<Cpu>::forward);
  m.impl("standardize_bwd", &StandardizeOps<Cpu>::backward);
}

}  // namespace fastkd
