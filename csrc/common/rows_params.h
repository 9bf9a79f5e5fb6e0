// What the rows schedule is told of a call.
#pragma once
#include "common/params.h"
#include "divergence_list.h"

namespace fastkd {

// A number that is one for all rows, which the host knows or which lies in memory; or one per row.
template <class T>
struct Number {
  const T* memory;  // [N] with stride 1, or [] with stride 0; or null
  int64_t stride;
  double of_all;  // where there is no memory
  FASTKD_HD double operator[](int64_t row) const { return memory ? double(memory[row * stride]) : of_all; }
  FASTKD_HD bool one() const { return !memory || stride == 0; }
};

// Softmax statistics of a row or of a block of it: the maximum logit and the sum of e^((z - max) / T), and of a whole
// row the sum of its slopes; where there are targets also the student's sum at temperature 1, and the factor of a
// target that is parted from the others. They are saved for backward, [N, 7]. They are always double: an error of the
// sum scales every class of the row.
struct RowsStats {
  double max_student, sum_student, max_teacher, sum_teacher, slope, sum_hard, factor;
};

// What a row's loss is beside its divergence D(q, p) from the teacher.
//   kCrossEntropy  soft_weight T^2 D + hard_weight CE, where CE is that of the student's softmax at temperature 1 with
//                  1 - smoothing at the target and smoothing / V everywhere
// The others part the target from the other classes: D, maxima and sums are those of the others alone, and with the log
// odds of the target, a of the student and b of the teacher, the loss is
//   kDecoupled     T^2 (second_parameter KL(coin of b || coin of a) + parameter D), all at their temperatures
//   kNormalized    q_y (-log p_y) + parameter T^2 D, where p_y and q_y are those of the target at temperature 1
// The gradient of the target's part is factor (p - y), with the p of the other classes, y = 1 at the target and
// factor = -d loss / d a.
enum class TargetLoss : int64_t { kCrossEntropy, kDecoupled, kNormalized, kCount };

struct HardTargets {
  const int64_t* target = nullptr;  // [N]; null: the divergence alone
  TargetLoss loss = TargetLoss::kCrossEntropy;
  double hard_weight = 0, soft_weight = 1, smoothing = 0;
  double classes = 0;  // of a row in all, over which labels are smoothed; where more than V, others may have the target
  FASTKD_HD bool is_class(int64_t of_row, int64_t V) const {
    return of_row < V && (of_row >= 0 || classes > double(V));
  }
  FASTKD_HD bool parted() const { return loss != TargetLoss::kCrossEntropy; }
  FASTKD_HD bool without_soft() const { return soft_weight == 0; }  // a part of weight 0 is left out, be it NaN
};

// What some of a row's classes have in its loss: see RowsSums in fastkd/_calls.py.
struct RowSums {
  double loss, slope, second;
};

// What is told of a row besides its loss, where it is asked for: both parts before they are weighed, the soft one with
// its T^2; the entropies of p and q; and 1 where the best class of both is the same, the first of equal ones, else 0.
// All 0 of a row that does not count.
struct RowParts {
  double hard, soft, student_entropy, teacher_entropy, agreement;
};

// T is the type that is computed in: float, or double where an input is double.
template <class T>
struct RowsParams {
  Divergence divergence;
  int64_t N, V;
  RowsTensor student, teacher;  // [N, V]
  RowsTensor grad;              // [N, V], the student's dtype; the student itself when in place
  Number<double> parameter;     // the divergence's own; 1 - x of an x near 1 keeps its digits
  Number<double> second_parameter;
  Number<T> temperature, teacher_temperature;
  bool t_squared;
  const bool* mask;  // [N], or null: every row counts
  const T* weight;   // [N], or null: 1
  HardTargets hard;
  const T* upstream;        // [N], or null: 1
  int64_t upstream_stride;  // 0: one upstream for all rows
  double grad_scale;        // 1 / divisor of the reduction
  const double* scale;      // the same in memory, where the host does not know it; or null
  T* loss;                  // [N]
  RowsStats* stats;         // [N], or null
  RowSums* sums;            // [N], of classes whose row has P.stats; or null
  RowParts* parts;          // [N], or null
  bool stream;              // write the gradient past the caches
  bool prefetch;            // this row and the next fit the second-level cache
};

}  // namespace fastkd
