// The rows schedule on the CPU: a divergence per row of student and teacher logits [N, V], and
// its gradient. Compiled once per instruction set.
//
//   p = softmax(student / T), q = softmax(teacher / T_teacher), w = log p - log q
//   loss[n]    = T^2 weight[n] sum_v loss(p, q, w)                      (+ the teacher's entropy)
//   grad[n, v] = T^2 weight[n] upstream[n] / divisor / T * (slope(p, q, w) - p sum_v slope)
//
// and, where rows have targets, the cross-entropy of softmax(student) and its gradient beside them, each with a weight.
//
// Two passes over blocks of kRowsBlock classes. The first reads student and teacher from memory
// and leaves e^(z - max) of both, each computed once, and their difference in a workspace that
// stays in L2, beside the sums. The second turns them into p, q and w, sums the loss and writes
// the gradient; where the sum of the slopes is not 0 it leaves the slopes in the workspace instead,
// and a third pass writes the gradient. Traffic: student + teacher + gradient, once each.
// Saved for backward: the gradient; or RowsStats, from which backward recomputes in one pass.
#include "cpu/rows_kernel.h"

#include "common/enum.h"
#include "cpu/prefetch.h"
#include "cpu/rows_blocks.h"
#include "cpu/rows_chunks.h"

namespace fastkd::FASTKD_ISA {
namespace {

// Whether the workspace has what P.parts tells of a row: exponentials, of all classes.
template <class D>
inline constexpr bool kDescribes = given<D>() == Given::kProbabilities && !kWithoutTarget<D>;

// First pass.
template <class T, class D>
void statistics(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, int64_t begin, int64_t end,
                Prefetch& ahead) {
  alignas(64) T student_buffer[kRowsBlock], teacher_buffer[kRowsBlock];
  const bool describes = kDescribes<D> && P.parts;
  const Row<T> r = row_constants(P, row);
  const char *student = P.student.row(row), *teacher = P.teacher.row(row);
  const int64_t target = P.hard.target ? P.hard.target[row] : -1;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRowsBlock, n = part(first, P.V, kRowsBlock);
    const T* s = load_block(P.student, student, first, n, student_buffer);
    const T* t = load_block(P.teacher, teacher, first, n, teacher_buffer);
    double logit = 0, teacher_logit = 0, entropy = 0, student_entropy = 0, logits = 0, sum_teacher = 0;
    if (target >= first && target < first + n) {
      logit = double(s[target - first]);  // now: the gradient may be written over the student
      if constexpr (kWithoutTarget<D>) {
        s = without(target - first, s, padded(n), student_buffer, logit);
        t = without(target - first, t, padded(n), teacher_buffer, teacher_logit);
      }
    }
    RowsStats sums{};
    if (given<D>() != Given::kLogOdds || P.hard.target) {  // else nothing is taken from log odds
      sums.max_student = double(finite_max(maximum(s, padded(n))));
      sums.max_teacher = double(finite_max(maximum(t, padded(n))));
    }
    for (int64_t i = 0; i < padded(n); i += kChunk) {
      const int64_t at = first + i, m = part(i, padded(n), kChunk);
      first_pass_chunk<D>(s + i, t + i, m, r, sums, W.exp_student + at, W.exp_teacher + at, W.difference + at);
      if (D::kTeacherEntropy || describes) entropy += entropy_chunk(t + i, W.exp_teacher + at, m, T(sums.max_teacher));
      if (describes) student_entropy += entropy_chunk(s + i, W.exp_student + at, m, T(sums.max_student));
      if (kWithoutTarget<D> && P.hard.loss == TargetLoss::kNormalized) {
        const int power = hard_power(P.teacher_temperature[row]);
        sum_teacher += hard_chunk(t + i, m, sums.max_teacher, power, W.exp_teacher + at, W.exp_hard + at);
      }
      if (P.hard.target) {
        sums.sum_hard +=
            hard_chunk(s + i, m, sums.max_student, power_of_row<D>(r), W.exp_student + at, W.exp_hard + at);
      }
      if (P.hard.smoothing != 0) logits += logits_chunk(s + i, part(i, n, kChunk), sums.max_student);
      ahead.some();
    }
    W.blocks[block] = {sums, 0, 0, 0, entropy, student_entropy, logit, teacher_logit, logits, sum_teacher};
  }
}

template <class T, class D>
RowsStats combine(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row) {
  if (kDescribes<D> && P.parts) {
    using S = RowsStats;
    P.parts[row] = {};
    P.parts[row].agreement = best_class<T>(P.student, row, P.V, W.blocks, &S::max_student, &S::sum_student) ==
                             best_class<T>(P.teacher, row, P.V, W.blocks, &S::max_teacher, &S::sum_teacher);
  }
  const Row<T> r = row_constants(P, row);
  const int64_t n = rows_blocks(P.V);
  using S = RowsStats;
  S out{};
  combine_side(W.blocks, n, &S::max_student, &S::sum_student, r.inv_temperature, out);
  combine_side(W.blocks, n, &S::max_teacher, &S::sum_teacher, r.inv_teacher_temperature, out);
  if (!P.hard.target) return out;
  for (int64_t b = 0; b < n; ++b) {
    const RowsStats& k = W.blocks[b].stats;
    if (k.sum_hard != 0) out.sum_hard += k.sum_hard * rebase(k.max_student, out.max_student, 1.0);
  }
  if (P.hard.parted()) out.factor = target_part(P, r, out, parted(W.blocks, n, out)).factor;
  return out;
}

// The gradient of a row that is masked out.
template <class T>
void zero_grad(const RowsParams<T>& P, int64_t row, int64_t begin, int64_t end) {
  if (!P.grad.data) return;
  alignas(64) const T zeros[kRowsBlock] = {};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRowsBlock;
    store_block(P.grad, P.grad.row(row), first, part(first, P.V, kRowsBlock), zeros, P.stream);
  }
}

// The gradient of a row whose divergence has none: that of its hard loss, if it has one.
template <class T, class D>
void hard_grad(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, const RowsStats& stats, int64_t begin,
               int64_t end) {
  if (!P.grad.data) return;
  if (!P.hard.target) return zero_grad(P, row, begin, end);
  alignas(64) T grad[kChunk];
  const Row<T> r = row_constants(P, row);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRowsBlock, n = part(first, P.V, kRowsBlock);
    const HardScale<T> k = hard_scale(P, r, stats, W.blocks[block].stats);
    for (int64_t i = 0; i < padded(n); i += kChunk) {
      std::memset(grad, 0, sizeof(grad));
      const int64_t at = first + i;
      add_hard(P, row, k, power_of_row<D>(r), W.exp_student + at, W.exp_hard + at, at, part(i, padded(n), kChunk),
               grad);
      store_block(P.grad, P.grad.row(row), first + i, part(i, n, kChunk), grad, P.stream);
    }
  }
}

// Second pass. Backwards: the blocks that the first pass touched last are the likeliest to be in cache.
template <class T, class D>
void reduce(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, const RowsStats& stats, int64_t begin,
            int64_t end, Prefetch& ahead) {
  // of a teacher of -inf alone: q = 0, which contributes nothing
  if (stats.sum_teacher == 0 || P.hard.without_soft()) {
    if (D::kCentred) hard_grad<T, D>(P, W, row, stats, begin, end);
    return;
  }
  alignas(64) T grad[kChunk];
  const Row<T> r = row_constants(P, row);
  const Scale<double> of_row = row_scale<D>(r, stats);
  const bool to_grad = D::kCentred && P.grad.data;
  char* grad_row = to_grad ? P.grad.row(row) : nullptr;
  for (int64_t block = end - 1; block >= begin; --block) {
    const int64_t first = block * kRowsBlock, n = part(first, P.V, kRowsBlock);
    RowsBlock& sums = W.blocks[block];
    const Scale<T> k = block_scale<D>(r, of_row, stats, sums.stats);
    const HardScale<T> hard = hard_scale(P, r, stats, sums.stats);
    for (int64_t i = 0; i < padded(n); i += kChunk) {
      const int64_t m = part(i, padded(n), kChunk), at = first + i;
      with_row_functor<D>(P.parameter[row], P.second_parameter[row], [&](auto divergence) {
        if (to_grad) {
          reduce_chunk_to_grad(divergence, W.exp_student + at, W.exp_teacher + at, W.difference + at, m, k, sums, grad);
        } else {
          reduce_chunk(divergence, W.exp_student + at, W.exp_teacher + at, W.difference + at, m, k, sums);
        }
      });
      if (to_grad && P.hard.target) {
        add_hard(P, row, hard, power_of_row<D>(r), W.exp_student + at, W.exp_hard + at, at, m, grad);
      }
      if (to_grad) store_block(P.grad, grad_row, at, part(i, n, kChunk), grad, P.stream);
      ahead.some();
    }
  }
}

// The sum of the slopes, which the gradient of a divergence that is not centred needs.
template <class T, class D>
void add_slopes(const RowsParams<T>& P, const RowsWorkspace<T>& W, RowsStats& stats) {
  for (int64_t block = 0; block < rows_blocks(P.V); ++block) stats.slope += W.blocks[block].slope;
  if constexpr (kTwoSums<D>) stats.factor = row_of_sums<D>(W.blocks, rows_blocks(P.V)).factor;
}

// Third pass, forwards again.
template <class T, class D>
void gradient(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, const RowsStats& stats, int64_t begin,
              int64_t end, Prefetch& ahead) {
  if (!P.grad.data) return;
  if (no_gradient(stats) || P.hard.without_soft()) return hard_grad<T, D>(P, W, row, stats, begin, end);
  alignas(64) T grad[kChunk];
  const Row<T> r = row_constants(P, row);
  const Scale<double> of_row = row_scale<D>(r, stats);
  char* grad_row = P.grad.row(row);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kRowsBlock, n = part(first, P.V, kRowsBlock);
    const Scale<T> k = block_scale<D>(r, of_row, stats, W.blocks[block].stats);
    const HardScale<T> hard = hard_scale(P, r, stats, W.blocks[block].stats);
    for (int64_t i = 0; i < padded(n); i += kChunk) {
      const int64_t at = first + i;
      const int64_t m = part(i, padded(n), kChunk);
      slopes_chunk<given<D>()>(W.exp_student + at, W.difference + at, m, k, grad);
      if (P.hard.target) {
        add_hard(P, row, hard, power_of_row<D>(r), W.exp_student + at, W.exp_hard + at, at, m, grad);
      }
      store_block(P.grad, grad_row, at, part(i, n, kChunk), grad, P.stream);
      ahead.some();
    }
  }
}

template <class T, class D>
void finish(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, const RowsStats& stats) {
  const Row<T> r = row_constants(P, row);
  const int64_t blocks = rows_blocks(P.V);
  double loss = 0;
  if (stats.sum_teacher != 0) {
    for (int64_t block = 0; block < blocks; ++block) loss += W.blocks[block].loss;
    if constexpr (kTwoSums<D>) loss = row_of_sums<D>(W.blocks, blocks).loss;
    if (D::kTeacherEntropy && P.hard.loss != TargetLoss::kDecoupled) {
      loss += teacher_entropy(W, P.V, r, stats);
    }
    if (stats.sum_student == 0) loss = kInf<double>;
  }
  if (P.parts) P.parts[row].soft = loss * squared(P, row);
  if (kDescribes<D> && P.parts) {
    P.parts[row].student_entropy = entropy_of(W.blocks, blocks, &RowsBlock::student_entropy, &RowsStats::max_student,
                                              &RowsStats::sum_student, r.inv_temperature, stats);
    P.parts[row].teacher_entropy = teacher_entropy(W, P.V, r, stats);
  }
  if (P.hard.parted()) {
    loss = parted_loss(P, r, stats, parted(W.blocks, blocks, stats), loss);
  } else {
    loss *= r.loss_scale;
  }
  if (P.hard.target && !P.hard.parted()) {
    double logit = 0, logits = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      logit += W.blocks[block].logit;
      const double below = W.blocks[block].stats.max_student - stats.max_student;
      logits += W.blocks[block].logits + double(part(block * kRowsBlock, P.V, kRowsBlock)) * below;
    }
    // a weight of 0 leaves out what may be infinite
    loss = P.hard.without_soft() ? 0 : loss;
    const double hard = hard_loss(P, stats, logit, logits);
    if (P.parts) P.parts[row].hard = hard;
    loss += P.hard.hard_weight == 0 ? 0 : hard * r.hard_loss_scale;
  }
  P.loss[row] = T(loss);
  if (P.stats) P.stats[row] = stats;
}

template <class T, class D>
void forward(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t begin, int64_t end) {
  const int64_t blocks = rows_blocks(P.V);
  for (int64_t row = begin; row < end; ++row) {
    if (P.mask && !P.mask[row]) {
      P.loss[row] = T(0);
      if (P.stats) P.stats[row] = {};
      if (kDescribes<D> && P.parts) P.parts[row] = {};
      zero_grad(P, row, 0, blocks);
      continue;
    }
    Prefetch ahead(P, row, end, D::kCentred || !P.grad.data ? 2 : 3);
    statistics<T, D>(P, W, row, 0, blocks, ahead);
    RowsStats stats = combine<T, D>(P, W, row);
    reduce<T, D>(P, W, row, stats, 0, blocks, ahead);
    if constexpr (!D::kCentred) {
      add_slopes<T, D>(P, W, stats);
      gradient<T, D>(P, W, row, stats, 0, blocks, ahead);
    }
    finish<T, D>(P, W, row, stats);
  }
  if (P.stream) stream_fence();
}

// Backward from RowsStats: the same arithmetic, chunk by chunk, with the row's own maxima.
template <class T, class D>
void backward_blocks(const RowsParams<T>& P, int64_t row, const RowsStats& stats, int64_t begin, int64_t end,
                     Prefetch& ahead) {
  alignas(64) T student_buffer[kChunk], teacher_buffer[kChunk], exp_student[kChunk], exp_teacher[kChunk];
  alignas(64) T difference[kChunk], grad[kChunk], exp_hard[kChunk];
  const Row<T> r = row_constants(P, row);
  const Scale<T> k = block_scale<D>(r, row_scale<D>(r, stats), stats, stats);
  const HardScale<T> hard = hard_scale(P, r, stats, stats);
  const bool soft = !no_gradient(stats) && !P.hard.without_soft();
  const char *student = P.student.row(row), *teacher = P.teacher.row(row);
  char* grad_row = P.grad.row(row);
  const int64_t target = P.hard.target ? P.hard.target[row] : -1;
  RowsStats sums = stats;  // the maxima are the row's own; the sums are known
  const int64_t last = part(0, P.V, end * kRowsBlock);
  for (int64_t first = begin * kRowsBlock; first < last; first += kChunk) {
    const int64_t n = part(first, last, kChunk), m = padded(n);
    const T* s = load_block(P.student, student, first, n, student_buffer);
    const T* t = load_block(P.teacher, teacher, first, n, teacher_buffer);
    if (kWithoutTarget<D> && target >= first && target < first + n) {
      double logit;
      s = without(target - first, s, m, student_buffer, logit);
      t = without(target - first, t, m, teacher_buffer, logit);
    }
    first_pass_chunk<D>(s, t, m, r, sums, exp_student, exp_teacher, difference);
    with_row_functor<D>(P.parameter[row], P.second_parameter[row], [&](auto divergence) {
      gradient_chunk(divergence, exp_student, exp_teacher, difference, m, k, grad);
    });
    if (P.hard.target) {
      if (!soft) std::memset(grad, 0, sizeof(grad));
      hard_chunk(s, m, stats.max_student, power_of_row<D>(r), exp_student, exp_hard);
      add_hard(P, row, hard, power_of_row<D>(r), exp_student, exp_hard, first, m, grad);
    }
    store_block(P.grad, grad_row, first, n, grad, P.stream);
    ahead.some();
  }
}

template <class T, class D>
void backward_of(const RowsParams<T>& P, int64_t row, int64_t begin, int64_t end, Prefetch& ahead) {
  const RowsStats& stats = P.stats[row];
  if ((P.mask && !P.mask[row]) || (no_gradient(stats) && !P.hard.target)) {
    zero_grad(P, row, begin, end);
  } else {
    backward_blocks<T, D>(P, row, stats, begin, end, ahead);
  }
}

template <class T, class D>
void backward(const RowsParams<T>& P, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    Prefetch ahead(P, row, end, 1);
    backward_of<T, D>(P, row, 0, rows_blocks(P.V), ahead);
  }
  if (P.stream) stream_fence();
}

// The parts of a row that several threads share: there is no next row to prefetch.
template <class T, class D>
void statistics_part(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, int64_t begin, int64_t end) {
  Prefetch none;
  statistics<T, D>(P, W, row, begin, end, none);
}
template <class T, class D>
void reduce_part(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, const RowsStats& stats, int64_t begin,
                 int64_t end) {
  Prefetch none;
  reduce<T, D>(P, W, row, stats, begin, end, none);
  if (P.stream) stream_fence();
}
template <class T, class D>
void gradient_part(const RowsParams<T>& P, const RowsWorkspace<T>& W, int64_t row, const RowsStats& stats,
                   int64_t begin, int64_t end) {
  Prefetch none;
  gradient<T, D>(P, W, row, stats, begin, end, none);
  if (P.stream) stream_fence();
}

template <class T, class D>
void backward_part(const RowsParams<T>& P, int64_t row, int64_t begin, int64_t end) {
  Prefetch none;
  backward_of<T, D>(P, row, begin, end, none);
  if (P.stream) stream_fence();
}

template <class T, class D>
const RowsKernel<T> kernel = {forward<T, D>,       backward<T, D>,    statistics_part<T, D>,
                              combine<T, D>,       reduce_part<T, D>, D::kCentred ? nullptr : add_slopes<T, D>,
                              gradient_part<T, D>, finish<T, D>,      backward_part<T, D>,
                              D::kTeacherEntropy,  kDescribes<D>};

}  // namespace

template <class T>
const RowsKernel<T>& rows_kernel(Divergence which) {
  return with_constant(which, [](auto k) -> const RowsKernel<T>& { return kernel<T, FunctorOf<k.value, T>>; });
}
template const RowsKernel<float>& rows_kernel<float>(Divergence);
template const RowsKernel<double>& rows_kernel<double>(Divergence);

}  // namespace fastkd::FASTKD_ISA
