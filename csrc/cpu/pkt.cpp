// The op of a strip of cosines on the CPU: checks the contract, deals columns to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/pkt_inputs.h"
#include "cpu/isa.h"
#include "cpu/pkt_kernel.h"

namespace fastkd {
namespace {

constexpr int64_t kColumns = 512;  // of a thread at a time: what it knows of them stays in L1

template <class T>
const PktKernel<T>& kernel() {
  return FASTKD_OF_ISA(pkt_kernel<T>());
}

template <class T>
double strip(const PktStripCall& in) {
  const auto data = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
  const int64_t rows = in.student.size(0), columns = in.student.size(1);
  const PktStrip<T> P{static_cast<T*>(in.student.mutable_data_ptr()),
                      data(in.teacher),
                      rows,
                      columns,
                      in.row,
                      data(in.valid),
                      data(in.student_inverse),
                      data(in.teacher_inverse),
                      data(in.weight),
                      data(in.scale),
                      T(in.eps)};
  const int64_t chunks = (columns + kColumns - 1) / kColumns;
  std::vector<double> losses(chunks);
  std::vector<T> row_slopes(chunks * rows);
  double* slopes = static_cast<double*>(in.slopes.mutable_data_ptr()) + in.row;
  std::vector<T> column_slopes(columns);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = c * kColumns, end = std::min(begin + kColumns, columns);
      losses[c] = kernel<T>().columns(P, begin, end, row_slopes.data() + c * rows, column_slopes.data() + begin);
      for (int64_t j = begin; j < end; ++j) slopes[j] += double(column_slopes[j]);
    }
  });
  double loss = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    loss += losses[c];
    for (int64_t i = 0; i < rows; ++i) slopes[i] += double(row_slopes[c * rows + i]);
  }
  return loss;
}

void pkt_strip_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = PktStripCall::read(arguments);
  check(in);
  Tensor loss = torch::stable::new_empty(in.slopes, {});
  *static_cast<double*>(loss.mutable_data_ptr()) =
      dispatch_compute(in.student.scalar_type(), [&](auto zero) { return strip<decltype(zero)>(in); });
  stack[0] = torch::stable::detail::from(loss);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("pkt_strip_", &pkt_strip_); }

}  // namespace fastkd
