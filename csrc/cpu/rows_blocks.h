// What the blocks of a row, each summed by itself, come to together: see rows_kernel.cpp.
#pragma once
#include <cmath>

#include "cpu/rows_kernel.h"
#include "cpu/rows_math.h"

namespace fastkd::FASTKD_ISA {
namespace {

inline int64_t part(int64_t begin, int64_t end, int64_t most) { return end - begin < most ? end - begin : most; }

// The blocks' maxima and sums, on one side, as those of the row.
inline void combine_side(const RowsBlock* blocks, int64_t n, double RowsStats::* max, double RowsStats::* sum,
                         double inv_temperature, RowsStats& out) {
  double m = -kInf<double>;
  for (int64_t b = 0; b < n; ++b) {  // a block of -inf alone has sum 0 and no maximum
    const RowsStats& k = blocks[b].stats;
    if (k.*sum != 0 && !(k.*max <= m)) m = k.*max;
  }
  out.*max = finite_max(m);
  out.*sum = 0;
  for (int64_t b = 0; b < n; ++b) {
    const RowsStats& k = blocks[b].stats;
    if (k.*sum != 0) out.*sum += k.*sum * rebase(k.*max, out.*max, inv_temperature);
  }
}

// What the blocks know of a target that is parted from the others.
inline Parted parted(const RowsBlock* blocks, int64_t n, const RowsStats& row) {
  Parted k{};
  for (int64_t b = 0; b < n; ++b) {
    const RowsBlock& block = blocks[b];
    k.logit += block.logit;
    k.teacher_logit += block.teacher_logit;
    if (block.sum_teacher != 0)
      k.sum_teacher += block.sum_teacher * rebase(block.stats.max_teacher, row.max_teacher, 1);
  }
  return k;
}

// The first of a side's classes that are the best. Before the gradient is written, perhaps over the student.
template <class T>
int64_t best_class(const RowsTensor& logits, int64_t row, int64_t V, const RowsBlock* blocks, double RowsStats::* max,
                   double RowsStats::* sum) {
  int64_t first = 0;
  double best = -kInf<double>;
  for (int64_t b = 0; b < rows_blocks(V); ++b) {
    const RowsStats& k = blocks[b].stats;
    if (k.*sum == 0 || !(k.*max > best)) continue;
    best = k.*max;
    first = b * kRowsBlock;
  }
  alignas(64) T buffer[kRowsBlock];
  const int64_t n = part(first, V, kRowsBlock);
  const T* z = load_block(logits, logits.row(row), first, n, buffer);
  for (int64_t i = 0; i < n; ++i) {
    if (double(z[i]) == best) return first + i;
  }
  return -1;
}

// The entropy of a side of a row; of a side without a possible class 0.
inline double entropy_of(const RowsBlock* blocks, int64_t n, double RowsBlock::* entropy, double RowsStats::* max,
                         double RowsStats::* sum, double inv_temperature, const RowsStats& row) {
  if (row.*sum == 0) return 0;
  double terms = 0;
  for (int64_t b = 0; b < n; ++b) {
    const RowsStats& k = blocks[b].stats;
    if (k.*sum == 0) continue;
    terms += (blocks[b].*entropy + k.*sum * (row.*max - k.*max)) * inv_temperature *
             rebase(k.*max, row.*max, inv_temperature);
  }
  return terms / row.*sum + std::log(row.*sum);
}
template <class T>
double teacher_entropy(const RowsWorkspace<T>& W, int64_t V, const Row<T>& r, const RowsStats& row) {
  return entropy_of(W.blocks, rows_blocks(V), &RowsBlock::entropy, &RowsStats::max_teacher, &RowsStats::sum_teacher,
                    r.inv_teacher_temperature, row);
}

// Of a divergence whose loss is no sum over classes, in double.
template <class D>
RowOfSums<double> row_of_sums(const RowsBlock* blocks, int64_t n) {
  double loss = 0, second = 0;
  for (int64_t block = 0; block < n; ++block) {
    loss += blocks[block].loss;
    second += blocks[block].second;
  }
  return D::InDouble::row(loss, second);
}

}  // namespace
}  // namespace fastkd::FASTKD_ISA
