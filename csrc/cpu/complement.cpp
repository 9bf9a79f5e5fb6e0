// The ops of what is beside K classes of a row on the CPU: sorts these, and deals rows to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/complement_op.h"
#include "cpu/complement_kernel.h"
#include "cpu/isa.h"

namespace fastkd {
namespace {

constexpr int64_t kGrain = 16384;  // classes that are worth a thread

struct Cpu {
  explicit Cpu(const Tensor&) {}
  static constexpr const char* kName = "on the CPU";
  static constexpr bool kValuesAtHand = true;
  static bool lies_with(const Tensor& x, const Tensor&) { return x.is_cpu(); }

  template <class T>
  void complement(ComplementParams<T>& P, bool backward) const {
    const std::vector<int64_t> sorted = sort(P);
    P.sorted = sorted.data();
    const ComplementKernel<T>& k = FASTKD_OF_ISA(complement_kernel<T>());
    torch::stable::parallel_for(0, P.rows.N, (kGrain + P.rows.V - 1) / P.rows.V, [&](int64_t begin, int64_t end) {
      backward ? k.backward(P, begin, end) : k.forward(P, begin, end);
    });
  }

 private:
  template <class T>
  static std::vector<int64_t> sort(const ComplementParams<T>& P) {
    const int64_t K = P.K;
    std::vector<int64_t> sorted(P.rows.N * K, kNoClass);
    torch::stable::parallel_for(0, P.rows.N, std::max<int64_t>(kGrain / (16 * std::max<int64_t>(K, 1)), 1),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t row = begin; row < end; ++row) {
                                    int64_t *const first = sorted.data() + row * K, *last = first;
                                    for (int64_t k = 0; k < K; ++k) {
                                      const int64_t v = P.indices[row * K + k];
                                      if (v >= 0 && v < P.rows.V) *last++ = key_of(v, k);
                                    }
                                    std::sort(first, last);
                                  }
                                });
    return sorted;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("complement_fwd", &ComplementOps<Cpu>::forward);
  m.impl("complement_bwd", &ComplementOps<Cpu>::backward);
}

}  // namespace fastkd
