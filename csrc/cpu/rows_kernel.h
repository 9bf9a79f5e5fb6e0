// The rows schedule compiled for one instruction set, as the binding sees it.
#pragma once
#include "common/rows_params.h"

namespace fastkd {

inline constexpr int64_t kRowsBlock = 1024;  // classes whose maximum is shared
FASTKD_HD constexpr int64_t rows_blocks(int64_t V) { return (V + kRowsBlock - 1) / kRowsBlock; }

// A block is summed by itself, so that the result does not depend on how blocks are dealt out
// to threads.
struct RowsBlock {
  RowsStats stats;
  double loss, slope, second;
  double entropy, student_entropy;  // sum e^((z - max) / T) (max - z), where it is asked for
  double logit, teacher_logit;      // of the target, where it is in the block
  double logits;                    // where labels are smoothed, the sum of z - max of all
  double sum_teacher;               // where it is asked for, at temperature 1
};

// What the first pass leaves for the second: [blocks * kRowsBlock] each, and [blocks].
template <class T>
struct RowsWorkspace {
  T* exp_student;
  T* exp_teacher;
  T* difference;  // student / T - teacher / T_teacher; then the slopes
  T* exp_hard;    // the student at temperature 1, where there are targets
  RowsBlock* blocks;

  static FASTKD_HD constexpr int64_t bytes(int64_t V, bool targets) {
    return rows_blocks(V) * ((targets ? 4 : 3) * kRowsBlock * int64_t(sizeof(T)) + int64_t(sizeof(RowsBlock)));
  }
  FASTKD_HD RowsWorkspace(void* memory, int64_t V, bool targets) {
    exp_student = static_cast<T*>(memory);
    exp_teacher = exp_student + rows_blocks(V) * kRowsBlock;
    difference = exp_teacher + rows_blocks(V) * kRowsBlock;
    exp_hard = difference + rows_blocks(V) * kRowsBlock;
    blocks = reinterpret_cast<RowsBlock*>(exp_hard + (targets ? rows_blocks(V) * kRowsBlock : 0));
  }
};

template <class T>
struct RowsKernel {
  using Params = RowsParams<T>;
  using Workspace = RowsWorkspace<T>;
  // rows begin .. end
  void (*forward)(const Params&, const Workspace&, int64_t begin, int64_t end);
  void (*backward)(const Params&, int64_t begin, int64_t end);
  // the same for one row, in parts: blocks begin .. end of each pass, and what stands between;
  // add_slopes is null where the second pass writes the gradient, and there is no third
  void (*statistics)(const Params&, const Workspace&, int64_t row, int64_t begin, int64_t end);
  RowsStats (*combine)(const Params&, const Workspace&, int64_t row);
  void (*reduce)(const Params&, const Workspace&, int64_t row, const RowsStats&, int64_t begin, int64_t end);
  void (*add_slopes)(const Params&, const Workspace&, RowsStats&);
  void (*gradient)(const Params&, const Workspace&, int64_t row, const RowsStats&, int64_t begin, int64_t end);
  void (*finish)(const Params&, const Workspace&, int64_t row, const RowsStats&);
  void (*backward_part)(const Params&, int64_t row, int64_t begin, int64_t end);
  bool teacher_entropy;  // whether it is a part of the loss that the first pass sums, in RowsBlock
  bool describes;        // whether all of P.parts comes of it: the exponentials are there
};

// The same for many rows at once, each in a lane of its own: rows begin .. end, at most kMostLanes, with one step from
// each to the next in every tensor, and one parameter unless any will do.
inline constexpr int64_t kMostLanes = 256;

template <class T>
struct RowsLanes {
  void (*forward)(const RowsParams<T>&, void* memory, int64_t begin, int64_t end);
  void (*backward)(const RowsParams<T>&, int64_t begin, int64_t end);
  bool any_parameters;

  // of memory, for a group of so many rows
  static FASTKD_HD constexpr int64_t bytes(int64_t V, int64_t rows, bool targets) {
    return (targets ? 4 : 3) * V * rows * int64_t(sizeof(T));
  }
};

// Whether rows begin .. end have the same parameters.
template <class T>
FASTKD_HD bool one_parameter(const RowsParams<T>& P, int64_t begin, int64_t end) {
  const auto same = [&](const Number<double>& x) {
    for (int64_t row = begin; !x.one() && row < end; ++row) {
      if (!(x[row] == x[begin])) return false;
    }
    return true;
  };
  return same(P.parameter) && same(P.second_parameter);
}

// One for each level of isa.h.
namespace baseline {
template <class T>
const RowsKernel<T>& rows_kernel(Divergence);
template <class T>
const RowsLanes<T>& rows_lanes(Divergence);
}  // namespace baseline
namespace avx2 {
template <class T>
const RowsKernel<T>& rows_kernel(Divergence);
template <class T>
const RowsLanes<T>& rows_lanes(Divergence);
}  // namespace avx2
namespace avx512 {
template <class T>
const RowsKernel<T>& rows_kernel(Divergence);
template <class T>
const RowsLanes<T>& rows_lanes(Divergence);
}  // namespace avx512

}  // namespace fastkd
