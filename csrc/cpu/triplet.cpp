// The op of a strip of triplets on the CPU: checks the contract, deals rows to threads, and adds what near pairs
// have of the gradient, by features, so that no two threads write to one place.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/triplet_inputs.h"
#include "cpu/isa.h"
#include "cpu/triplet_kernel.h"

namespace fastkd {
namespace {

using torch::stable::parallel_for;

template <class T>
const TripletKernel<T>& kernel() {
  return FASTKD_OF_ISA(triplet_kernel<T>());
}

template <class T>
TripletStrip<T> strip(const TripletStripCall& in) {
  const auto data = [](const Tensor& x, auto zero) { return static_cast<const decltype(zero)*>(x.const_data_ptr()); };
  const int64_t N = in.strip.size(1), length = in.positives.size(0);
  const TripletStrip<T> P{static_cast<T*>(in.strip.mutable_data_ptr()),
                          in.strip.size(0),
                          in.row,
                          N,
                          in.x.size(1),
                          data(in.x, T()),
                          data(in.norms, T()),
                          data(in.positives, int64_t()),
                          data(in.first, int64_t()),
                          data(in.last, int64_t()),
                          data(in.valid, bool()),
                          *data(in.count, int64_t()),
                          data(in.weight, T()),
                          T(in.margin),
                          in.grad.has_value()};
  for (int64_t i = P.row; i < P.row + P.rows; ++i) {
    FASTKD_CHECK(P.first[i] >= 0 && P.last[i] <= length, "first and last: within the positives wanted");
  }
  for (int64_t p = 0; p < length; ++p) {
    FASTKD_CHECK(P.positives[p] >= 0 && P.positives[p] < N, "positives: samples from 0 to ", N - 1, " wanted");
  }
  return P;
}

template <class T>
void add_near(const std::vector<std::vector<NearPair<T>>>& near, const TripletStrip<T>& P, T* grad) {
  const bool any = std::any_of(near.begin(), near.end(), [](const auto& row) { return !row.empty(); });
  if (!any) return;
  parallel_for(0, P.D, 16, [&](int64_t begin, int64_t end) {
    for (const auto& row : near) {
      for (const NearPair<T>& pair : row) {
        const T *x = P.x + pair.i * P.D, *y = P.x + pair.j * P.D;
        T *to_x = grad + pair.i * P.D, *to_y = grad + pair.j * P.D;
        for (int64_t d = begin; d < end; ++d) {
          const T part = pair.weight * (x[d] - y[d]);
          to_x[d] += part;
          to_y[d] -= part;
        }
      }
    }
  });
}

template <class T>
void run(const TripletStripCall& in, double* total) {
  const TripletStrip<T> P = strip<T>(in);
  std::vector<TripletSums> sums(P.rows);
  std::vector<std::vector<NearPair<T>>> near(P.rows);
  parallel_for(0, P.rows, 65536 / (P.N + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel<T>().row(P, i, sums[i], near[i]);
  });
  for (const TripletSums& s : sums) {
    total[0] += s.loss;
    total[1] += s.active;
    total[2] += s.triplets;
  }
  if (in.grad) add_near(near, P, static_cast<T*>(in.grad->mutable_data_ptr()));
}

void triplet_strip_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = TripletStripCall::read(arguments);
  check(in);
  Tensor sums = torch::stable::new_empty(in.strip, {3}, ScalarType::Double);
  double* total = static_cast<double*>(sums.mutable_data_ptr());
  std::fill_n(total, 3, 0.0);
  dispatch_compute(in.strip.scalar_type(), [&](auto zero) { run<decltype(zero)>(in, total); });
  stack[0] = torch::stable::detail::from(sums);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("triplet_strip_", &triplet_strip_); }

}  // namespace fastkd
