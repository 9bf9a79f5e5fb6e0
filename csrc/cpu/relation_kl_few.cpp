// relation_kl between few samples on the CPU: both matrices of similarities whole, the rows schedule over them, and one
// product for the gradient, in one op. Many samples, and keys, are walked in strips by fastkd/ops/relation_kl.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/rows.h"
#include "cpu/samples.h"

namespace fastkd {
namespace {

template <class T>
class FewRelations {
 public:
  explicit FewRelations(const RelationKLFew& in) : in_(in), N_(in.student.size(0)) {
    if (in.mask) mask_ = static_cast<const bool*>(in.mask->const_data_ptr());
    count_ = mask_ ? std::count(mask_, mask_ + N_, true) : N_;
  }

  // grad: [N, D_s], contiguous, or none
  void operator()(Tensor& loss, Tensor* grad) const {
    if (count_ == 0) {
      torch::stable::zero_(loss);
      if (grad) torch::stable::zero_(*grad);
      return;
    }
    const Lengths lengths{in_.normalize};
    const Side student(*this, in_.student, lengths), teacher(*this, in_.teacher, lengths);
    Tensor S = torch::stable::new_empty(student.keys, {N_, N_}), R = torch::stable::new_empty(student.keys, {N_, N_});
    similarities(S, student);
    similarities(R, teacher);
    const OptionalTensor none;
    rows_forward(RowsCall{S, R, in_.divergence, in_.parameter, in_.parameter_rows, in_.temperature,
                          in_.temperature_rows, in_.teacher_temperature, in_.teacher_temperature_rows, false, in_.mask,
                          in_.weight, 1 / double(count_), none, none, none, 0, 0.0, none},
                 RowsForward{loss, grad ? OptionalTensor(S) : none, none, none});
    if (grad) gradient(static_cast<T*>(S.mutable_data_ptr()), student, static_cast<T*>(grad->mutable_data_ptr()));
  }

 private:
  // Rows, and the keys that they are compared with: the same rows less their mean, which a softmax does not see, so
  // that embeddings far from the origin keep their digits.
  struct Side {
    Side(const FewRelations& call, const Tensor& given, const Lengths& lengths)
        : rows(given, call.mask_, lengths),
          keys(torch::stable::new_empty(given, {call.N_, given.size(1)}, kComputed<T>)),
          mean(given.size(1)) {
      const Matrix<T>& x = rows.matrix;
      T* centered = static_cast<T*>(keys.mutable_data_ptr());
      FASTKD_OF_ISA(samples_kernel<T>())
          .center(x.data, x.rows, x.columns, x.row_stride, call.mask_, centered, mean.data());
      matrix = {centered, x.rows, x.columns, x.columns};
    }

    Embeddings<T> rows;
    Tensor keys;
    std::vector<T> mean;
    Matrix<T> matrix;  // of the keys
  };

  void similarities(const Tensor& out, const Side& side) const {
    T* S = static_cast<T*>(out.mutable_data_ptr());
    gemm(Matrix<T>{S, N_, N_, N_}, side.rows.matrix, side.matrix.transposed());
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; in_.exclude_self && i < N_; ++i) S[i * N_ + i] = kNone;
    for (int64_t j = 0; mask_ && j < N_; ++j) {
      for (int64_t i = 0; !mask_[j] && i < N_; ++i) S[i * N_ + j] = kNone;
    }
  }

  // Of W = dL/dS: W K + W^T X with X = K + mean, that is (W + W^T) K and, as each row of W sums to 0, the sum of a row
  // of W + W^T times the mean.
  void gradient(T* W, const Side& student, T* grad) const {
    const SamplesKernel<T>& kernel = FASTKD_OF_ISA(samples_kernel<T>());
    const int64_t D = student.matrix.columns;
    symmetrize(W, N_);
    gemm(Matrix<T>{grad, N_, D, D}, Matrix<T>{W, N_, N_, N_}, student.matrix);
    for_rows(N_, N_ + D,
             [&](int64_t i) { kernel.add(grad + i * D, student.mean.data(), D, T(kernel.sum(W + i * N_, N_))); });
    student.rows.through_lengths(grad);
  }

  const RelationKLFew& in_;
  const int64_t N_;
  const bool* mask_ = nullptr;
  int64_t count_;
};

void relation_kl_few(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const auto in = RelationKLFew::read(arguments);
  const Tensor &s = in.student, &t = in.teacher;
  FASTKD_CHECK(s.is_cpu() && t.is_cpu(), "student and teacher: tensors on the CPU wanted");
  FASTKD_CHECK(s.dim() == 2 && t.dim() == 2 && t.size(0) == s.size(0) && s.size(0) > 0,
               "student and teacher: embeddings [N, D] of as many rows wanted, of one at least");
  to_dtype(s.scalar_type(), "student");
  to_dtype(t.scalar_type(), "teacher");
  FASTKD_CHECK(!in.mask || (in.mask->is_cpu() && in.mask->scalar_type() == ScalarType::Bool &&
                            in.mask->is_contiguous() && in.mask->numel() == s.size(0)),
               "mask: one bool per row wanted, contiguous");
  const ScalarType compute = compute_type(s.scalar_type(), t.scalar_type());
  few_samples(stack, s, compute, in.save, [&](Tensor& loss, Tensor* grad) {
    dispatch_compute(compute, [&](auto zero) { FewRelations<decltype(zero)>{in}(loss, grad); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("relation_kl_few", &relation_kl_few); }

}  // namespace fastkd
