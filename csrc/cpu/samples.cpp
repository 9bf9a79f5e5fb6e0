// similarity_preserving, gram_mse and pkt of few samples on the CPU: both matrices of inner products whole, a kernel
// over their rows, and one product for the gradient, in one op. Many samples are walked in strips, by fastkd/ops.
#include "cpu/samples.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "calls.h"
#include "common/numbers.h"
#include "cpu/pkt_kernel.h"

namespace fastkd {
namespace {

// The numbers are those of fastkd/ops/samples.py.
enum class Relation : int64_t { kSimilarity, kGram, kPkt, kCount };

struct SamplesInputs : SamplesCall {
  // in place of the number, and of the tensor that holds one
  Relation relation = static_cast<Relation>(SamplesCall::relation);
  double eps = number(SamplesCall::eps, "eps");

  int64_t N() const { return student.size(0); }
  ScalarType compute() const { return compute_type(student.scalar_type(), teacher.scalar_type()); }
};

void check(const SamplesInputs& in) {
  FASTKD_CHECK(in.student.is_cpu() && in.teacher.is_cpu(), "student and teacher: tensors on the CPU wanted");
  FASTKD_CHECK(in.student.dim() == 2 && in.teacher.dim() == 2 && in.teacher.size(0) == in.N(),
               "student and teacher: embeddings [N, D] of as many rows wanted");
  to_dtype(in.student.scalar_type(), "student");
  to_dtype(in.teacher.scalar_type(), "teacher");
  FASTKD_CHECK(in.relation >= Relation::kSimilarity && in.relation < Relation::kCount,
               "relation: there is none with this number");
  FASTKD_CHECK(in.clamp >= 0 && in.clamp <= 2, "clamp: from 0 to 2 wanted, got ", in.clamp);
  FASTKD_CHECK(!in.mask || (in.mask->is_cpu() && in.mask->scalar_type() == ScalarType::Bool &&
                            in.mask->is_contiguous() && in.mask->numel() == in.N()),
               "mask: one bool per row wanted, contiguous");
  FASTKD_CHECK(!in.weight || (in.weight->is_cpu() && in.weight->dim() == 1 && in.weight->numel() == in.N()),
               "weight: one per row wanted");
  FASTKD_CHECK(in.relation != Relation::kPkt || (float(in.eps) > 0 && std::isfinite(in.eps)),
               "eps: a positive finite number wanted, got ", in.eps);
}

template <class T>
class Samples {
 public:
  explicit Samples(const SamplesInputs& in) : in_(in), kernel_(FASTKD_OF_ISA(samples_kernel<T>())), N_(in.N()) {
    if (in.mask) mask_ = static_cast<const bool*>(in.mask->const_data_ptr());
    count_ = mask_ ? std::count(mask_, mask_ + N_, true) : N_;
    if (in.weight) {
      weight_ = torch::stable::new_empty(*in.weight, {N_}, kType);
      torch::stable::copy_(*weight_, *in.weight);
    }
  }

  // grad: [N, D_s], contiguous, or none
  double operator()(Tensor* grad) {
    // one sample alone has no pair, but in a Gram matrix it is similar to itself
    if (count_ < (in_.relation == Relation::kGram ? 1 : 2)) {
      if (grad) torch::stable::zero_(*grad);
      return 0;
    }
    const bool pkt = in_.relation == Relation::kPkt;
    const Lengths lengths =
        pkt ? Lengths{true, in_.eps, Length::kMore} : Lengths{in_.normalize, 1e-12, Length::kAtLeast};
    const Embeddings<T> student(in_.student, mask_, lengths), teacher(in_.teacher, mask_, lengths);
    const Tensor memory = torch::stable::new_empty(student.tensor, {2, N_, N_}, kType);
    T* G = static_cast<T*>(memory.mutable_data_ptr());
    T* H = G + N_ * N_;
    gemm(square(G), student.matrix, student.matrix.transposed());
    gemm(square(H), teacher.matrix, teacher.matrix.transposed());
    const double loss = weights(G, H);
    if (grad) {
      T* g = static_cast<T*>(grad->mutable_data_ptr());
      const int64_t D = student.matrix.columns;
      gemm(Matrix<T>{g, N_, D, D}, square(G), student.matrix);
      student.through_lengths(g);
    }
    return loss;
  }

 private:
  static constexpr ScalarType kType = kComputed<T>;

  bool counts(int64_t i) const { return !mask_ || mask_[i]; }
  double weight(int64_t i) const {
    if (!counts(i)) return 0;
    return weight_ ? double(static_cast<const T*>(weight_->const_data_ptr())[i]) : 1;
  }
  Matrix<T> square(const T* x) const { return {x, N_, N_, N_}; }

  // The loss. G becomes W of dL/dX = W X, where a gradient is wanted.
  double weights(T* G, T* H) {
    switch (in_.relation) {
      case Relation::kSimilarity:
        return similarity(G, H);
      case Relation::kGram:
        return gram(G, H);
      default:
        return pkt(G, H);
    }
  }

  double similarity(T* G, const T* H) {
    const double pairs = double(count_) * double(count_);
    std::vector<double> losses(N_);
    for_rows(N_, N_, [&](int64_t i) {
      const double by = weight(i) / pairs, of_row = kernel_.similarity(G + i * N_, H + i * N_, N_, by);
      losses[i] = counts(i) ? by * of_row : 0;
    });
    if (in_.save) symmetrize(G, N_);
    return sum(losses);
  }

  double gram(T* G, const T* H) {
    const double by = 1 / (double(count_) * double(count_));
    std::vector<T> half;
    for (int64_t i = 0; in_.weight && i < N_; ++i) half.push_back(T(weight(i) / 2));
    std::vector<double> squares(N_);
    for_rows(N_, N_, [&](int64_t i) {
      squares[i] = kernel_.gram(G + i * N_, H + i * N_, N_, int(in_.clamp), half.empty() ? T(0) : half[i],
                                half.empty() ? nullptr : half.data(), T(4 * by));
    });
    return sum(squares) * by;
  }

  // In the kernel of strips, of which this is one; see pkt_kernel.h. What the sums of similarities add to the gradient
  // is of rank 1, and goes into W.
  double pkt(T* G, const T* H) {
    std::vector<T> of_samples(5 * N_);
    T *valid = of_samples.data(), *inverse = valid + N_, *teacher_inverse = inverse + N_;
    T *loss_weight = teacher_inverse + N_, *scale = loss_weight + N_;
    const double pairs = double(count_) * double(count_);
    for_rows(N_, N_, [&](int64_t i) {
      if (!counts(i)) return;
      const double r = (kernel_.sum(G + i * N_, N_) + double(count_)) / 2;
      const double of_teacher = (kernel_.sum(H + i * N_, N_) + double(count_)) / 2;
      valid[i] = 1;
      inverse[i] = T(1 / r);
      teacher_inverse[i] = T(1 / of_teacher);
      loss_weight[i] = T(weight(i) / pairs);
      scale[i] = T(0.5 * (weight(i) / pairs) / r);
    });
    const PktStrip<T> strip{G, H, N_, N_, 0, valid, inverse, teacher_inverse, loss_weight, scale, T(in_.eps)};
    const PktKernel<T>& kernel = FASTKD_OF_ISA(pkt_kernel<T>());
    constexpr int64_t kColumns = 64;
    const int64_t chunks = (N_ + kColumns - 1) / kColumns;
    std::vector<double> losses(chunks);
    std::vector<T> slopes(chunks * N_), q(N_), unused(N_);  // every pair is in the strip in both orders
    for_rows(chunks, kColumns * N_, [&](int64_t c) {
      losses[c] = kernel.columns(strip, c * kColumns, std::min((c + 1) * kColumns, N_), slopes.data() + c * N_,
                                 unused.data() + c * kColumns);
    });
    if (in_.save) {
      for (int64_t i = 0; i < N_; ++i) {
        double slope = 0;
        for (int64_t c = 0; c < chunks; ++c) slope += double(slopes[c * N_ + i]);
        q[i] = T(slope) * scale[i];
      }
      for_rows(N_, N_, [&](int64_t i) { kernel_.subtract(G + i * N_, N_, q[i], q.data()); });
    }
    return sum(losses);
  }

  static double sum(const std::vector<double>& x) {
    double total = 0;
    for (double one : x) total += one;
    return total;
  }

  const SamplesInputs& in_;
  const SamplesKernel<T>& kernel_;
  const int64_t N_;
  const bool* mask_ = nullptr;
  int64_t count_;
  OptionalTensor weight_;
};

void samples_fwd(StableIValue* stack, uint64_t, uint64_t) {
  Arguments arguments(stack);
  const SamplesInputs in{SamplesCall::read(arguments)};
  check(in);
  const ScalarType compute = in.compute();
  few_samples(stack, in.student, compute, in.save, [&](Tensor& loss, Tensor* grad) {
    dispatch_compute(compute, [&](auto zero) {
      using T = decltype(zero);
      *static_cast<T*>(loss.mutable_data_ptr()) = T(Samples<T>(in)(grad));
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("samples_fwd", &samples_fwd); }

}  // namespace fastkd
