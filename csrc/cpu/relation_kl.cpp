// The ops of a strip of relation_kl between samples on the CPU: check the contract, deal columns to threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "calls.h"
#include "common/rows_tensor.h"
#include "cpu/isa.h"
#include "cpu/relation_kl_kernel.h"

namespace fastkd {
namespace {

using torch::stable::parallel_for;

constexpr int64_t kColumns = 512;  // of a thread at a time

template <class T>
const RelationKLKernel<T>& kernel() {
  return FASTKD_OF_ISA(relation_kl_kernel<T>());
}

// Of RelationKLSums and of RelationKLWeights: the samples.
template <class Call>
int64_t samples(const Call& in) {
  return in.row + in.student.size(1);
}

bool is(const Tensor& x, ScalarType type, int64_t elements) {
  return x.is_cpu() && x.is_contiguous() && x.scalar_type() == type && x.numel() == elements;
}

template <class Call>
void check(const Call& in) {
  const ScalarType type = in.student.scalar_type();
  FASTKD_CHECK(type == ScalarType::Float || type == ScalarType::Double, "student: float32 or float64 wanted");
  FASTKD_CHECK(in.student.dim() == 2 && in.teacher.dim() == 2, "student and teacher: strips [rows, columns] wanted");
  const int64_t rows = in.student.size(0), columns = in.student.size(1);
  FASTKD_CHECK(is(in.student, type, rows * columns) && is(in.teacher, type, rows * columns) &&
                   in.teacher.size(0) == rows && in.row >= 0 && rows <= columns,
               "student and teacher: contiguous strips of one shape and dtype wanted, from the diagonal on");
  FASTKD_CHECK(is(in.valid, type, samples(in)), "valid: one per sample wanted, of the strips' dtype");
  FASTKD_CHECK(in.student_scale > 0 && std::isfinite(in.student_scale) && in.teacher_scale > 0 &&
                   std::isfinite(in.teacher_scale),
               "scales: positive finite numbers wanted");
}

template <class T, class Call>
RelationStrip<T> strip(const Call& in) {
  return {static_cast<T*>(in.student.mutable_data_ptr()),
          static_cast<T*>(in.teacher.mutable_data_ptr()),
          in.student.size(0),
          in.student.size(1),
          in.row,
          T(in.student_scale),
          T(in.teacher_scale),
          static_cast<const T*>(in.valid.const_data_ptr())};
}

// f(chunk, begin, end) of the columns.
template <class F>
void for_columns(int64_t columns, F&& f) {
  parallel_for(0, (columns + kColumns - 1) / kColumns, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c, c * kColumns, std::min((c + 1) * kColumns, columns));
  });
}

void relation_kl_sums(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = RelationKLSums::read(arguments);
  check(in);
  FASTKD_CHECK(is(in.sums, ScalarType::Double, 2 * samples(in)), "sums: float64 [N, 2] wanted");
  double* sums = static_cast<double*>(in.sums.mutable_data_ptr()) + 2 * in.row;
  dispatch_compute(in.student.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RelationStrip<T> P = strip<T>(in);
    const int64_t chunks = (P.columns + kColumns - 1) / kColumns;
    std::vector<double> of_rows(chunks * 2 * P.rows);
    for_columns(P.columns, [&](int64_t c, int64_t begin, int64_t end) {
      kernel<T>().sums(P, begin, end, of_rows.data() + c * 2 * P.rows, sums);
    });
    for (int64_t c = 0; c < chunks; ++c) {
      for (int64_t i = 0; i < 2 * P.rows; ++i) sums[i] += of_rows[c * 2 * P.rows + i];
    }
  });
}

void relation_kl_weights_(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = RelationKLWeights::read(arguments);
  check(in);
  for (const Tensor* x : {&in.student_inverse, &in.teacher_inverse, &in.difference, &in.weight, &in.scale}) {
    FASTKD_CHECK(is(*x, in.student.scalar_type(), samples(in)),
                 "inverses, difference, weight and scale: one per sample wanted, of the strips' dtype");
  }
  Tensor loss = torch::stable::new_empty(in.student, {}, ScalarType::Double);
  dispatch_compute(in.student.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const RelationStrip<T> P = strip<T>(in);
    const auto data = [](const Tensor& x) { return static_cast<const T*>(x.const_data_ptr()); };
    const RelationRows<T> R{data(in.student_inverse), data(in.teacher_inverse), data(in.difference), data(in.weight),
                            data(in.scale)};
    std::vector<double> losses((P.columns + kColumns - 1) / kColumns);
    for_columns(P.columns,
                [&](int64_t c, int64_t begin, int64_t end) { losses[c] = kernel<T>().weights(P, R, begin, end); });
    double total = 0;
    for (const double part : losses) total += part;
    *static_cast<double*>(loss.mutable_data_ptr()) = total;
  });
  stack[0] = torch::stable::detail::from(loss);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("relation_kl_sums", &relation_kl_sums);
  m.impl("relation_kl_weights_", &relation_kl_weights_);
}

}  // namespace fastkd
